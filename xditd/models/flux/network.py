"""Flux on a device: ComfyUI's inputs in, the network's raw output out. Knows no ranks and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn

from xditd.catalog.layouts.flux import pieces
from xditd.models.flux import inputs
from xditd.models.flux.config import config
from xditd.models.flux.splits import SPLITS
from xditd.models.tokens import Tokens

GUIDANCE = 3.5
"""Of a distilled model whose conditioning says none, as in ComfyUI."""

Call = Callable[..., torch.Tensor]
"""FluxTransformer2DModel's keywords in, tokens [B, n, C] out."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What Flux is conditioned on, on the device and in the compute dtype."""

    context: torch.Tensor  # [1 or B, n, context_width]
    pooled: torch.Tensor  # [1 or B, pooled_width]
    guidance: float


class Flux:
    """A Flux transformer.

    Attributes:
        backbone: diffusers' module.
        call: what runs it. At first the module itself; `rank.parallel` puts itself in its place.
    """

    tokens = Tokens(image={"hidden_states": 1, "img_ids": 0}, text={"encoder_hidden_states": 1, "txt_ids": 0})

    splits = SPLITS
    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> FluxTransformer2DModel:
        """The module, as the facts have it."""
        return FluxTransformer2DModel(**config(facts))

    def __init__(
        self,
        backbone: FluxTransformer2DModel,
        facts: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        self.heads: int = backbone.config.num_attention_heads
        self.call: Call = partial(self.run, backbone)
        self._time = _ExactTime(backbone)
        self._image_ids = lru_cache(maxsize=32)(inputs.image_ids)

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
        """A conditioning from the tensors `context` and `pooled` and the value `guidance`."""
        return Conditioning(
            context=tensors["context"].to(self.dtype),
            pooled=tensors["pooled"].to(self.dtype),
            guidance=values.get("guidance", GUIDANCE),
        )

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The velocity at x.

        Args:
            x: [B, C, H, W] on the device, any float dtype, any height and width.
            sigma: float32 [B], 0 to 1.
            conditioning: of batch 1 or B.

        Returns:
            [B, C, H, W] in the compute dtype.
        """
        _, _, height, width = x.shape
        keywords = self.keywords(tuple(x.shape), sigma, conditioning)
        tokens = self.call(hidden_states=inputs.pack(x.to(self.dtype)), **keywords)
        return inputs.unpack(tokens, height, width)

    def keywords(
        self, shape: tuple[int, ...], sigma: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        """What a call for a latent of a shape takes beside its tokens; the time embedding is told its times."""
        batch, _, height, width = shape
        guidance = None
        if self.backbone.config.guidance_embeds:
            guidance = torch.full((batch,), conditioning.guidance, device=self.device)
        self._time.set(sigma, guidance)
        return {
            "encoder_hidden_states": conditioning.context.expand(batch, -1, -1),
            "pooled_projections": conditioning.pooled.expand(batch, -1),
            "timestep": sigma,
            "guidance": guidance,
            "img_ids": self._image_ids(height, width, self.device),
            "txt_ids": inputs.text_ids(conditioning.context.shape[1], self.device),
        }

    def run(self, module: Callable[..., Any], **keywords: Any) -> torch.Tensor:
        """A module on some of the tokens, or on all."""
        output = module(**keywords, return_dict=False)[0]
        tokens: torch.Tensor = (
            output[0] if isinstance(output, tuple) else output
        )  # xfuser's is (tokens, None)
        return tokens


class _ExactTime:
    """Gives the time embedding its float32 arguments.

    diffusers (and xfuser's copy of its forward) casts sigma and guidance to the model's dtype before it multiplies
    them by 1000: in bfloat16 that is off by up to 3 of 1000 steps. ComfyUI and the makers' code do not.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._times: tuple[torch.Tensor, ...] = ()
        embedding: Any = backbone.time_text_embed
        embedding.register_forward_pre_hook(self._exchange)

    def set(self, sigma: torch.Tensor, guidance: torch.Tensor | None) -> None:
        times = (sigma,) if guidance is None else (sigma, guidance)
        self._times = tuple(time.float() * 1000 for time in times)

    def _exchange(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*self._times, arguments[-1])
