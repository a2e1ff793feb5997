"""PixArt on a device: ComfyUI's inputs in, the network's raw output out. Knows no ranks and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from xditd.catalog.layouts.pixart import pieces
from xditd.models.patches import Embed, grid, join, run, split
from xditd.models.pixart.config import config, scales
from xditd.models.pixart.splits import SPLITS
from xditd.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What PixArt is conditioned on, on the device and in the compute dtype. Sizes of None are the latent's."""

    context: torch.Tensor  # [1 or B, n, context_width]
    height: float | None
    width: float | None
    aspect_ratio: float | None


class PixArt:
    """A PixArt transformer.

    Attributes:
        backbone: diffusers' module, whose patch embedding is ours.
        call: what runs it. At first the module itself; `rank.parallel` puts itself in its place.
    """

    tokens = Tokens(image={"patches": 1, "places": 1}, attention=(("image",),))

    splits = SPLITS
    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> PixArtTransformer2DModel:
        """The module, as the facts have it."""
        backbone = PixArtTransformer2DModel(**config(facts))
        backbone._repeated_blocks = ["BasicTransformerBlock"]  # for compiling by block; diffusers names none
        return backbone

    def __init__(
        self,
        backbone: PixArtTransformer2DModel,
        facts: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        self.heads: int = backbone.config.num_attention_heads
        self.call: Callable[..., torch.Tensor] = partial(self.run, backbone)
        self._facts = facts
        self._embed: Any = Embed(backbone.pos_embed)
        backbone.pos_embed = self._embed
        self._places = lru_cache(maxsize=32)(self._make_places)

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
        """A conditioning from the tensor `context` and the values `height`, `width` and `aspect_ratio`."""
        height, width, ratio = (values.get(name) for name in ("height", "width", "aspect_ratio"))
        return Conditioning(tensors["context"].to(self.dtype), height, width, ratio)

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The noise in x; what the network learned of its variance is left out.

        Args:
            x: [B, C, H, W] on the device, any float dtype, of an even height and width.
            t: index of a timestep, float32 [B].
            conditioning: of batch 1 or B.

        Returns:
            [B, C, H, W] in the compute dtype.
        """
        _, channels, height, width = x.shape
        keywords = self.keywords(tuple(x.shape), t, conditioning)
        predicted = self.call(patches=split(x.to(self.dtype), self._embed.size), **keywords)
        return join(predicted[:, :, :channels], height, width)

    def keywords(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """What a call for a latent of a shape takes beside its patches."""
        batch, _, height, width = shape
        return {
            "places": self._places(height, width, self.device),
            "encoder_hidden_states": conditioning.context.expand(batch, -1, -1),
            "timestep": t,
            "added_cond_kwargs": self._sizes(conditioning, batch, height, width),
        }

    def run(
        self, module: Callable[..., Any], *, patches: torch.Tensor, places: torch.Tensor, **same: Any
    ) -> torch.Tensor:
        """A module on some of the patches, which stand in these places."""
        self._embed.places = places
        return run(module, patches, **same)

    def _sizes(
        self, conditioning: Conditioning, batch: int, height: int, width: int
    ) -> dict[str, torch.Tensor | None]:
        if not self._facts["sizes"]:
            return {"resolution": None, "aspect_ratio": None}
        scale = self._facts["scale"]
        given = conditioning
        size = (given.height or height * scale, given.width or width * scale)
        ratio = given.aspect_ratio or height / width
        return {
            # In the compute dtype, as ComfyUI hands them over.
            "resolution": torch.tensor([size], dtype=self.dtype, device=self.device).expand(batch, -1),
            "aspect_ratio": torch.tensor([[ratio]], dtype=self.dtype, device=self.device).expand(batch, -1),
        }

    def _make_places(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Embeddings of the places of a latent's patches, [1, n, width]. diffusers' own have one size of picture in mind."""
        base, divisor = scales(self._facts, height, width)
        places: torch.Tensor = get_2d_sincos_pos_embed(
            self._facts["width"],
            grid(height, width, self._embed.size),
            base_size=base,
            interpolation_scale=divisor,
            device=device,
        )
        return places.to(self.dtype)[None]
