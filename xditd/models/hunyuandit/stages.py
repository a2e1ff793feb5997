"""HunyuanDiT in stages: see `models.stages`. The loop over diffusers' blocks, taken apart.

The text is no stream here, as in PixArt. Blocks of the second half take what those of the first half gave, in reverse
order: it goes from stage to stage with the image until it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from xditd.catalog.families.hunyuandit import PATCH
from xditd.models import patches
from xditd.models.hunyuandit.network import Conditioning, HunyuanDiT
from xditd.models.stages import Recall, Span, Stream


@dataclass(frozen=True, slots=True)
class Given:
    """Of one call."""

    vector: torch.Tensor  # that modulates every block, from time, pooled text and sizes
    text: torch.Tensor  # [B, n, context_width]
    turns: tuple[torch.Tensor, torch.Tensor]  # cosines and sines of image tokens


class Staged:
    """As `models.stages.Stages` says."""

    def __init__(self, network: HunyuanDiT) -> None:
        self._network = network
        self._backbone: Any = network.backbone
        self.width: int = self._backbone.inner_dim
        self.recall = Recall()
        blocks = self._backbone.blocks
        self._half = len(blocks) // 2
        self._held = [i for i, block in enumerate(blocks) if not isinstance(block, nn.Identity)]
        first = self._held[0]
        # What blocks of the first half before this stage gave, without what blocks of the second half have taken of it.
        self.skips = min(first, self._half - 1) - max(0, first - self._half - 1)
        for name, module in self._backbone.named_modules():
            if name.endswith(".attn1"):
                module.set_processor(_Attend(self.recall, name))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return patches.split(x, PATCH)

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return patches.join(tokens, height, width)

    def text(self, conditioning: Conditioning) -> int:
        return 0

    def give(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> Given:
        keywords = self._network.keywords(shape, t, conditioning)
        return Given(keywords["vector"], keywords["text"], (keywords["cos"], keywords["sin"]))

    def enter(self, tokens: torch.Tensor, given: Given, span: Span) -> Stream:
        return Stream(0, patches.embed(self._backbone.pos_embed, tokens))

    def through(self, stream: Stream, given: Given, span: Span) -> Stream:
        image, *skips = stream.tokens.chunk(1 + self.skips, 1)
        cos, sin = (turn[span.begin : span.end] for turn in given.turns)
        for i in self._held:
            image = self._backbone.blocks[i](
                image,
                encoder_hidden_states=given.text,
                temb=given.vector,
                image_rotary_emb=(cos, sin),
                skip=skips.pop() if i > self._half else None,
            )
            if i < self._half - 1:
                skips.append(image)
        return Stream(0, torch.cat((image, *skips), 1))

    def leave(self, stream: Stream, given: Given) -> torch.Tensor:
        backbone = self._backbone
        image = patches.predicted(backbone.proj_out(backbone.norm_out(stream.tokens, given.vector)), PATCH)
        return image[:, :, : backbone.config.in_channels]  # without the variance


class _Attend:
    """Attention of an image to itself as diffusers' HunyuanAttnProcessor2_0 has it, but that K and V are the whole image's:
    after they were turned, which depends on where each token stands."""

    def __init__(self, recall: Recall, name: str) -> None:
        self._recall = recall
        self._name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = apply_rotary_emb(attn.norm_q(query), image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(attn.norm_k(key), image_rotary_emb, sequence_dim=1)
        key, value = self._recall((self._name, "key"), key), self._recall((self._name, "value"), value)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        seen = F.scaled_dot_product_attention(query, key, value)
        attended: torch.Tensor = attn.to_out[1](attn.to_out[0](seen.transpose(1, 2).flatten(2)))
        return attended
