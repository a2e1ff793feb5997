"""HunyuanDiT on a device: ComfyUI's inputs in, the network's raw output out. Knows no ranks and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel

from xditd.catalog.families.hunyuandit import PATCH, VALUES
from xditd.catalog.layouts.hunyuandit import pieces
from xditd.models.hunyuandit.config import config, spans
from xditd.models.hunyuandit.splits import SPLITS
from xditd.models.patches import Embed, embed, grid, join, predicted, split
from xditd.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What HunyuanDiT is conditioned on, on the device and in the compute dtype."""

    context: torch.Tensor  # [1 or B, n, context_width]
    context_t5: torch.Tensor  # [1 or B, m, t5_width]
    mask: torch.Tensor | None  # [1 or B, n]
    mask_t5: torch.Tensor | None  # [1 or B, m]
    sizes: Mapping[str, float]


class HunyuanDiT:
    """A HunyuanDiT transformer.

    Its modules are called one by one: diffusers' own forward rounds the timestep to the compute dtype or computes in
    float32, and takes texts of one length only.

    Attributes:
        backbone: diffusers' module, whose patch embedding is ours.
        call: what runs it. At first the module itself; `rank.parallel` puts itself in its place.
    """

    tokens = Tokens(image={"patches": 1, "cos": 0, "sin": 0}, attention=(("image",),))

    splits = SPLITS
    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> HunyuanDiT2DModel:
        """The module, as the facts have it."""
        backbone = HunyuanDiT2DModel(**config(facts))
        backbone._repeated_blocks = ["HunyuanDiTBlock"]  # for compiling by block; diffusers names none
        return backbone

    def __init__(
        self,
        backbone: HunyuanDiT2DModel,
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
        self._turns = lru_cache(maxsize=32)(self._make_turns)

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
        """A conditioning from the tensors `context` and `context_t5`, their masks, and the values that say sizes."""
        context, context_t5 = (tensors[name].to(self.dtype) for name in ("context", "context_t5"))
        return Conditioning(context, context_t5, tensors.get("mask"), tensors.get("mask_t5"), values)

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """v at x; what the network learned of its variance is left out.

        Args:
            x: [B, C, H, W] on the device, any float dtype, any height and width.
            t: index of a timestep, float32 [B].
            conditioning: of batch 1 or B.

        Returns:
            [B, C, H, W] in the compute dtype.
        """
        _, channels, height, width = x.shape
        keywords = self.keywords(tuple(x.shape), t, conditioning)
        output = self.call(patches=split(x.to(self.dtype), PATCH), **keywords)
        return join(output[:, :, :channels], height, width)

    def keywords(
        self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, torch.Tensor]:
        """What a call for a latent of a shape takes beside its patches."""
        batch, _, height, width = shape
        cos, sin = self._turns(*grid(height, width, PATCH))
        return {
            "cos": cos,
            "sin": sin,
            "text": self._text(conditioning, batch),
            "vector": self._vector(t, conditioning, shape),
        }

    def run(
        self,
        module: Any,
        *,
        patches: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        text: torch.Tensor,
        vector: torch.Tensor,
    ) -> torch.Tensor:
        """A module on some of the patches, which are turned by these angles."""
        x = embed(self._embed, patches)
        half = len(module.blocks) // 2
        skips: list[torch.Tensor] = []
        for i, block in enumerate(module.blocks):
            x = block(
                x,
                encoder_hidden_states=text,
                temb=vector,
                image_rotary_emb=(cos, sin),
                skip=skips.pop() if i > half else None,
            )
            if i < half - 1:
                skips.append(x)
        return predicted(module.proj_out(module.norm_out(x, vector)), PATCH)

    def _text(self, given: Conditioning, batch: int) -> torch.Tensor:
        """The texts of BERT and mT5, [B, n + m, context_width], with padding where a mask says so.

        They may be longer than the padding: as in ComfyUI, it stands at their end then, and the pooling reads their
        beginning.
        """
        padding = self.backbone.text_embedding_padding
        paddings = padding.split([self._facts["text_tokens"], self._facts["t5_tokens"]])
        texts = (given.context, self.backbone.text_embedder(given.context_t5))
        padded = map(_padded, texts, (given.mask, given.mask_t5), paddings)
        return torch.cat([text.expand(batch, -1, -1) for text in padded], dim=1)

    def _vector(self, t: torch.Tensor, conditioning: Conditioning, shape: tuple[int, ...]) -> torch.Tensor:
        """What modulates every block, [B, width]: the time, the pooled text, and where they count, sizes and style."""
        embedding, batch = self.backbone.time_extra_emb, shape[0]
        # Of the time itself in float32: diffusers takes its dtype for that of the arithmetic.
        time: torch.Tensor = embedding.timestep_embedder(embedding.time_proj(t).to(self.dtype))
        pooled = embedding.pooler(conditioning.context_t5[:, : self._facts["t5_tokens"]])
        extra = [pooled.expand(batch, -1)]
        if self._facts["sizes"]:
            sizes = torch.tensor(self._sizes(conditioning.sizes, shape), dtype=self.dtype, device=self.device)
            known = embedding.size_proj(sizes).to(self.dtype).view(1, -1)
            extra += [known.expand(batch, -1), embedding.style_embedder.weight[:1].expand(batch, -1)]
        return time + embedding.extra_embedder(torch.cat(extra, dim=1))

    def _sizes(self, given: Mapping[str, float], shape: tuple[int, ...]) -> list[float]:
        """Those of the picture that was cut, of the one that is made, and where it was cut; absent ones are the latent's."""
        rows, columns = (float(side * self._facts["scale"]) for side in shape[2:])
        height, width = given.get("height", rows), given.get("width", columns)
        absent = {"height": height, "width": width, "target_height": height, "target_width": width}
        return [given.get(name, absent.get(name, 0.0)) for name in VALUES]

    def _make_turns(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the places of a grid's patches, each [rows·columns, head_dim], float32.

        diffusers' own places are those of a square only: what it takes for the end of a span is wrong where the
        beginning is not 0.
        """
        lines = []
        for number, (begin, end) in zip((rows, columns), spans(rows, columns), strict=True):
            # In float64 and then rounded, as numpy's linspace without its endpoint, which the makers use.
            steps = torch.arange(number, dtype=torch.float64)
            lines.append((steps * ((end - begin) / number) + begin).float())
        across, down = torch.meshgrid(lines[1], lines[0], indexing="xy")
        cos, sin = get_2d_rotary_pos_embed_from_grid(
            self._facts["head_dim"], torch.stack([across, down])[:, None], use_real=True
        )
        return cos.to(self.device), sin.to(self.device)


def _padded(text: torch.Tensor, mask: torch.Tensor | None, padding: torch.Tensor) -> torch.Tensor:
    """A text [B, n, width] whose last tokens, as many as there is padding, are replaced where the mask [B, n] is 0."""
    if mask is None:
        return text
    count = padding.shape[0]
    kept, end = text[:, :-count], text[:, -count:]
    end = torch.where(mask[:, -count:, None].bool(), end, padding)  # of the larger batch of the two
    return torch.cat([kept.expand(end.shape[0], -1, -1), end], dim=1)
