"""Flux in stages: see `models.stages`. The forward of diffusers' FluxTransformer2DModel, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    _get_qkv_projections,
)

from xditd.models.flux import inputs
from xditd.models.flux.network import Conditioning, Flux
from xditd.models.stages import Recall, Span, Stream, held_blocks


@dataclass(frozen=True, slots=True)
class Given:
    """Of one call."""

    time: torch.Tensor  # with pooled text and guidance, embedded
    context: torch.Tensor  # [B, n, context_width]
    turns: tuple[torch.Tensor, torch.Tensor]  # cosines and sines of text and image tokens


class Staged:
    """As `models.stages.Stages` says."""

    def __init__(self, network: Flux) -> None:
        self._network = network
        self._backbone: Any = network.backbone
        self.width: int = self._backbone.inner_dim
        self.recall = Recall()
        self.skips = 0
        for name, module in self._backbone.named_modules():
            if isinstance(module, FluxAttention):
                module.set_processor(_Attend(self.recall, name))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return inputs.pack(x)

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return inputs.unpack(tokens, height, width)

    def text(self, conditioning: Conditioning) -> int:
        return conditioning.context.shape[1]

    def give(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning) -> Given:
        keywords = self._network.keywords(shape, t, conditioning)
        times = [keywords["timestep"]] + ([keywords["guidance"]] if keywords["guidance"] is not None else [])
        return Given(
            time=self._backbone.time_text_embed(*times, keywords["pooled_projections"]),
            context=keywords["encoder_hidden_states"],
            turns=self._backbone.pos_embed(torch.cat((keywords["txt_ids"], keywords["img_ids"]))),
        )

    def enter(self, tokens: torch.Tensor, given: Given, span: Span) -> Stream:
        text = self._backbone.context_embedder(given.context)
        return Stream(text.shape[1], torch.cat((text, self._backbone.x_embedder(tokens)), 1))

    def through(self, stream: Stream, given: Given, span: Span) -> Stream:
        count = stream.text
        text, image = stream.tokens[:, :count], stream.tokens[:, count:]
        cos, sin = (
            torch.cat((turn[:count], turn[count + span.begin : count + span.end])) for turn in given.turns
        )
        for blocks in (self._backbone.transformer_blocks, self._backbone.single_transformer_blocks):
            for block in held_blocks(blocks):
                text, image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=given.time,
                    image_rotary_emb=(cos, sin),
                )
        return Stream(count, torch.cat((text, image), 1))

    def leave(self, stream: Stream, given: Given) -> torch.Tensor:
        image = self._backbone.norm_out(stream.tokens[:, stream.text :], given.time)
        predicted: torch.Tensor = self._backbone.proj_out(image)
        return predicted


class _Attend(FluxAttnProcessor):
    """diffusers' own, but that K and V of the image are the whole image's: after they were turned, which depends on where
    each token stands."""

    def __init__(self, recall: Recall, name: str) -> None:
        super().__init__()
        self._recall = recall
        self._name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        joint = encoder_hidden_states is not None
        parts: list[Any] = [
            part if part is None else part.unflatten(-1, (-1, attn.head_dim))
            for part in _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        ]
        query, key, value, *text_parts = parts
        query, key = attn.norm_q(query), attn.norm_k(key)
        # A single block has text and image in one; how much is text, the image's span tells.
        text = query.shape[1] - self._recall.count
        if joint:
            text_query, text_key, text_value = text_parts
            text = text_query.shape[1]
            query = torch.cat((attn.norm_added_q(text_query), query), 1)
            key = torch.cat((attn.norm_added_k(text_key), key), 1)
            value = torch.cat((text_value, value), 1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        key, value = (
            torch.cat((part[:, :text], self._recall((self._name, kind), part[:, text:])), 1)
            for kind, part in (("key", key), ("value", value))
        )
        seen = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        seen = seen.flatten(2, 3).to(query.dtype)
        if not joint:
            return seen
        image = attn.to_out[1](attn.to_out[0](seen[:, text:].contiguous()))
        return image, attn.to_add_out(seen[:, :text].contiguous())
