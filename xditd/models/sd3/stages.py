"""SD3 in stages: see `models.stages`. The forward of diffusers' SD3Transformer2DModel, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xditd.models import patches
from xditd.models.sd3.network import SD3, Conditioning
from xditd.models.stages import Recall, Span, Stream, held_blocks


@dataclass(frozen=True, slots=True)
class Given:
    """Of one call."""

    time: torch.Tensor  # with pooled text, embedded
    context: torch.Tensor  # [B, n, context_width]
    places: torch.Tensor  # [1, n, width]


class Staged:
    """As `models.stages.Stages` says."""

    def __init__(self, network: SD3) -> None:
        self._network = network
        self._backbone: Any = network.backbone
        self.width: int = self._backbone.inner_dim
        self.recall = Recall()
        self.skips = 0
        named = self._backbone.named_modules()
        self.recall.follow({name: module for name, module in named if name.endswith((".attn", ".attn2"))})

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return patches.split(x, self._backbone.config.patch_size)

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return patches.join(tokens, height, width)

    def text(self, conditioning: Conditioning) -> int:
        return conditioning.context.shape[1]

    def give(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> Given:
        keywords = self._network.keywords(shape, t, conditioning)
        return Given(
            time=self._backbone.time_text_embed(t, keywords["pooled_projections"]),
            context=keywords["encoder_hidden_states"],
            places=keywords["places"],
        )

    def enter(self, tokens: torch.Tensor, given: Given, span: Span) -> Stream:
        image = patches.embed(self._backbone.pos_embed, tokens, given.places[:, span.begin : span.end])
        text = self._backbone.context_embedder(given.context)
        return Stream(text.shape[1], torch.cat((text, image), 1))

    def through(self, stream: Stream, given: Given, span: Span) -> Stream:
        text, image = stream.tokens[:, : stream.text], stream.tokens[:, stream.text :]
        for block in held_blocks(self._backbone.transformer_blocks):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=given.time)
        # The last of all blocks has no use for what the text would become.
        return Stream(0, image) if text is None else Stream(stream.text, torch.cat((text, image), 1))

    def leave(self, stream: Stream, given: Given) -> torch.Tensor:
        image = self._backbone.norm_out(stream.tokens[:, stream.text :], given.time)
        return patches.predicted(self._backbone.proj_out(image), self._backbone.config.patch_size)
