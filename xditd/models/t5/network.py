"""T5's encoder on a device: tokens in, hidden states out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel, T5Stack

from xditd.catalog.families import t5
from xditd.catalog.layouts.piece import Piece
from xditd.models.t5.config import config
from xditd.models.text import additive, embed


class T5:
    """A T5 encoder. Its blocks are called one by one, because the hidden state of one in the middle may be wanted."""

    @staticmethod
    def empty(facts: Mapping[str, int]) -> T5Stack:
        """The module, as the facts have it."""
        return T5EncoderModel(T5Config(**config(facts))).encoder

    @staticmethod
    def pieces(facts: Mapping[str, int], prefix: str) -> dict[str, Piece]:
        """Every parameter, from its makers' layout."""
        table = {key.removeprefix("encoder."): Piece(prefix + key) for key in t5.parameters(facts)}
        table["embed_tokens.weight"] = table.pop("shared.weight")
        return table

    def __init__(
        self, backbone: T5Stack, facts: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype

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
        """Hidden states [B, n, width], float32, and no pooled output: T5 has none. Arguments as `Clip.encode`."""
        blocks = self.backbone.block
        x = embed(self.backbone.embed_tokens, tokens, vectors)
        attend = None if mask is None else additive(mask, x, causal=False)
        last = len(blocks) - 1 if layer is None else range(len(blocks))[layer]
        bias = None  # of relative positions: the first block makes it for all
        for block in blocks[: last + 1]:
            x, bias, *_ = block(x, attend, bias)
        if layer is None or final_norm:
            x = self.backbone.final_layer_norm(x)
        return x.float(), None
