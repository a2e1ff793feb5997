"""SD3 on a device: ComfyUI's inputs in, the network's raw output out. Knows no ranks and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from xditd.catalog.layouts.sd3 import pieces
from xditd.models.patches import Embed, grid, join, run, split
from xditd.models.sd3.config import config
from xditd.models.sd3.splits import SPLITS
from xditd.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What SD3 is conditioned on, on the device and in the compute dtype."""

    context: torch.Tensor  # [1 or B, n, context_width]
    pooled: torch.Tensor  # [1 or B, pooled_width]


class SD3:
    """An SD3 transformer.

    Attributes:
        backbone: diffusers' module, whose patch embedding is ours.
        call: what runs it. At first the module itself; `rank.parallel` puts itself in its place.
    """

    splits = SPLITS
    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> SD3Transformer2DModel:
        """The module, as the facts have it."""
        backbone = SD3Transformer2DModel(**config(facts))
        backbone._repeated_blocks = ["JointTransformerBlock"]  # for compiling by block; diffusers names none
        return backbone

    def __init__(
        self,
        backbone: SD3Transformer2DModel,
        facts: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        self.heads: int = backbone.config.num_attention_heads
        dual = (("image",),) if backbone.config.dual_attention_layers else ()
        self.tokens = Tokens(
            image={"patches": 1, "places": 1},
            text={"encoder_hidden_states": 1},
            attention=(("image", "text"), *dual),
        )
        self.call: Callable[..., torch.Tensor] = partial(self.run, backbone)
        side = backbone.config.pos_embed_max_size
        stock: Any = backbone.pos_embed
        self._places = stock.pos_embed.view(side, side, -1)
        self._embed: Any = Embed(stock)
        backbone.pos_embed = self._embed
        self._cropped = lru_cache(maxsize=32)(self._crop)

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
        """A conditioning from the tensors `context` and `pooled`."""
        return Conditioning(tensors["context"].to(self.dtype), tensors["pooled"].to(self.dtype))

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The velocity at x.

        Args:
            x: [B, C, H, W] on the device, any float dtype, of a height and width that the positions cover.
            t: 1000 × sigma, float32 [B].
            conditioning: of batch 1 or B.

        Returns:
            [B, C, H, W] in the compute dtype.
        """
        _, _, height, width = x.shape
        keywords = self.keywords(tuple(x.shape), t, conditioning)
        predicted = self.call(patches=split(x.to(self.dtype), self._embed.size), **keywords)
        return join(predicted, height, width)

    def keywords(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """What a call for a latent of a shape takes beside its patches."""
        batch, _, height, width = shape
        return {
            "places": self._cropped(*grid(height, width, self._embed.size)),
            "encoder_hidden_states": conditioning.context.expand(batch, -1, -1),
            "pooled_projections": conditioning.pooled.expand(batch, -1),
            "timestep": t,
        }

    def run(
        self, module: Callable[..., Any], *, patches: torch.Tensor, places: torch.Tensor, **same: Any
    ) -> torch.Tensor:
        """A module on some of the patches, which stand in these places."""
        self._embed.places = places
        return run(module, patches, **same)

    def _crop(self, rows: int, columns: int) -> torch.Tensor:
        """Embeddings of the positions of a grid in the middle of all, [1, rows·columns, width]."""
        side = self._places.shape[0]
        top, left = (side - rows) // 2, (side - columns) // 2
        return self._places[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)
