"""BERT's text encoder on a device: tokens in, hidden states out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel

from xditd.catalog.families import bert
from xditd.catalog.layouts.piece import Piece
from xditd.models.bert.config import config
from xditd.models.text import additive, embed


class Bert:
    """A BERT text encoder. Its layers are called one by one, because the hidden state of one in the middle may be wanted."""

    @staticmethod
    def empty(facts: Mapping[str, int]) -> BertModel:
        """The module, as the facts have it."""
        return BertModel(BertConfig(**config(facts)), add_pooling_layer=False)

    @staticmethod
    def pieces(facts: Mapping[str, int], prefix: str) -> dict[str, Piece]:
        """Every parameter, from transformers' layout."""
        return {key.removeprefix("bert."): Piece(prefix + key) for key in bert.parameters(facts)}

    def __init__(
        self, backbone: BertModel, facts: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        # Buffers that no file holds.
        embeddings: Any = backbone.embeddings
        embeddings.position_ids = torch.arange(facts["positions"], device=device).expand(1, -1)
        embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)

    def encode(
        self,
        tokens: torch.Tensor,
        *,
        vectors: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: str = "none",
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [B, n, width], float32, and no pooled output. Arguments as `Clip.encode`; it has no final norm:
        every layer ends with its own."""
        embeddings: Any = self.backbone.embeddings
        x = embeddings(inputs_embeds=embed(embeddings.word_embeddings, tokens, vectors))
        attend = None if mask is None else additive(mask, x, causal=False)
        layers: Any = self.backbone.encoder.layer
        last = len(layers) - 1 if layer is None else range(len(layers))[layer]
        for block in layers[: last + 1]:
            x = block(x, attend)
        return x.float(), None
