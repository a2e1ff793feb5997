"""CLIP's text encoders on a device: tokens in, hidden states and the pooled output out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from xditd.catalog.families import clip
from xditd.catalog.layouts import openclip
from xditd.catalog.layouts.piece import Piece
from xditd.models.clip.config import config
from xditd.models.text import additive, embed


class Backbone(nn.Module):
    """CLIP's text model and its projection, by the names of the files."""

    def __init__(self, facts: Mapping[str, int]) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(CLIPTextConfig(**config(facts)))
        kind = Projection if facts["openclip"] else partial(nn.Linear, bias=False)
        self.text_projection = kind(facts["width"], facts["width"]) if facts["projection"] else None


class Projection(nn.Module):
    """A linear layer of OpenCLIP's, whose matrix is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Clip:
    """A CLIP text encoder.

    Its modules are called one by one: transformers' own forward takes no vectors, and tells of no layer but the last
    without those of all.
    """

    empty = staticmethod(Backbone)

    @staticmethod
    def pieces(facts: Mapping[str, int], prefix: str) -> dict[str, Piece]:
        """Every parameter, from transformers' layout or OpenCLIP's."""
        if facts["openclip"]:
            return openclip.pieces(facts, prefix)
        return {key: Piece(prefix + key) for key in clip.parameters(facts)}

    def __init__(
        self, backbone: Backbone, facts: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        # A buffer that no file holds.
        positions = torch.arange(facts["positions"], device=device)
        backbone.text_model.embeddings.position_ids = positions.expand(1, -1)

    def encode(
        self,
        tokens: torch.Tensor,
        *,
        vectors: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: str = "none",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, n, width] and the pooled output [B, width] or None, both float32.

        Args:
            tokens: [B, n], integers; -1 - i stands for row i of `vectors`.
            vectors: [k, width].
            mask: [B, n]; what is 0 is not attended to.
            layer: whose hidden state, as the catalog lets it pass; None is the last one's, after the final norm.
            final_norm: whether that of another layer goes through the final norm, too.
            pooled: "none", "plain" or "projected".

        Raises:
            XditError: `bad_value` for tokens that are none.
        """
        text = self.backbone.text_model
        x = embed(text.embeddings.token_embedding, tokens, vectors)
        x = text.embeddings(inputs_embeds=x)
        attend = additive(mask, x, causal=True)
        layers = text.encoder.layers
        chosen = None if layer is None else range(len(layers))[layer]
        hidden = None
        for i, block in enumerate(layers):
            x = block(x, attend)
            if i == chosen:
                hidden = text.final_layer_norm(x) if final_norm else x
                if pooled == "none":
                    return hidden.float(), None
        x = text.final_layer_norm(x)
        return (x if hidden is None else hidden).float(), self._pool(x, tokens, pooled)

    def _pool(self, x: torch.Tensor, tokens: torch.Tensor, pooled: str) -> torch.Tensor | None:
        if pooled == "none":
            return None
        ends = tokens == clip.END
        # Of a text without an end the last token, as ComfyUI takes it; argmax gives the first of several.
        place = torch.where(ends.any(-1), ends.int().argmax(-1), tokens.shape[-1] - 1)
        plain = x[torch.arange(x.shape[0], device=x.device), place]
        if pooled == "projected":
            assert self.backbone.text_projection is not None
            plain = self.backbone.text_projection(plain)
        return plain.float()
