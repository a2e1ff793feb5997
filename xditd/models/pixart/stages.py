"""PixArt in stages: see `models.stages`. The forward of diffusers' PixArtTransformer2DModel, taken apart.

The text is no stream here: every image token attends to it in each block, and each stage embeds it for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xditd.models import patches
from xditd.models.pixart.network import Conditioning, PixArt
from xditd.models.stages import Recall, Span, Stream, held_blocks


@dataclass(frozen=True, slots=True)
class Given:
    """Of one call."""

    modulation: torch.Tensor  # of the blocks, from time and sizes
    time: torch.Tensor  # the same before it became that
    context: torch.Tensor  # [B, n, width]
    places: torch.Tensor  # [1, n, width]


class Staged:
    """As `models.stages.Stages` says."""

    def __init__(self, network: PixArt) -> None:
        self._network = network
        self._backbone: Any = network.backbone
        self.width: int = self._backbone.inner_dim
        self.recall = Recall()
        self.skips = 0
        named = self._backbone.named_modules()
        self.recall.follow({name: module for name, module in named if name.endswith(".attn1")})

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return patches.split(x, self._backbone.config.patch_size)

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return patches.join(tokens, height, width)

    def text(self, conditioning: Conditioning) -> int:
        return 0

    def give(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> Given:
        keywords = self._network.keywords(shape, t, conditioning)
        modulation, time = self._backbone.adaln_single(
            t, keywords["added_cond_kwargs"], batch_size=shape[0], hidden_dtype=self._network.dtype
        )
        context = self._backbone.caption_projection(keywords["encoder_hidden_states"])
        return Given(modulation, time, context, keywords["places"])

    def enter(self, tokens: torch.Tensor, given: Given, span: Span) -> Stream:
        return Stream(
            0, patches.embed(self._backbone.pos_embed, tokens, given.places[:, span.begin : span.end])
        )

    def through(self, stream: Stream, given: Given, span: Span) -> Stream:
        image = stream.tokens
        for block in held_blocks(self._backbone.transformer_blocks):
            image = block(image, encoder_hidden_states=given.context, timestep=given.modulation)
        return Stream(0, image)

    def leave(self, stream: Stream, given: Given) -> torch.Tensor:
        backbone = self._backbone
        shift, scale = (backbone.scale_shift_table[None] + given.time[:, None]).chunk(2, dim=1)
        image = backbone.proj_out(backbone.norm_out(stream.tokens) * (1 + scale) + shift)
        predicted = patches.predicted(image, backbone.config.patch_size)
        return predicted[:, :, : backbone.config.in_channels]  # without the variance
