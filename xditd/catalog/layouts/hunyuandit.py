"""HunyuanDiT: which parameter of diffusers' HunyuanDiT2DModel comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: scripts/convert_hunyuandit_to_diffusers.py). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.expected import count, has
from xditd.catalog.families.hunyuandit import MAX_BLOCKS
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "text_embedder.linear_1": "mlp_t5.0",
    "text_embedder.linear_2": "mlp_t5.2",
    "pos_embed.proj": "x_embedder.proj",
    "time_extra_emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_extra_emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_extra_emb.pooler.k_proj": "pooler.k_proj",
    "time_extra_emb.pooler.q_proj": "pooler.q_proj",
    "time_extra_emb.pooler.v_proj": "pooler.v_proj",
    "time_extra_emb.pooler.c_proj": "pooler.c_proj",
    "time_extra_emb.extra_embedder.linear_1": "extra_embedder.0",
    "time_extra_emb.extra_embedder.linear_2": "extra_embedder.2",
    "proj_out": "final_layer.linear",
}
"""Layers (weight and bias) outside the blocks."""

BLOCK = {
    "norm1.norm": "norm1",
    "norm1.linear": "default_modulation.1",
    # The makers number their norms by what they were added for, diffusers in their order.
    "norm2": "norm3",
    "norm3": "norm2",
    "attn1.norm_q": "attn1.q_norm",
    "attn1.norm_k": "attn1.k_norm",
    "attn1.to_out.0": "attn1.out_proj",
    "attn2.norm_q": "attn2.q_norm",
    "attn2.norm_k": "attn2.k_norm",
    "attn2.to_q": "attn2.q_proj",
    "attn2.to_out.0": "attn2.out_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
"""Layers of a block."""

SKIP = {"skip_norm": "skip_norm", "skip_linear": "skip_linear"}
"""Those of a block in the second half, which gets what one in the first half gave."""

FUSED = {
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
}
"""Layers that the files hold as one, in equal parts."""


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout, but for widths; None where it is no HunyuanDiT."""
    if (
        "time_extra_emb.pooler.k_proj.weight" not in header.tensors
        or "text_embedding_padding" not in header.tensors
    ):
        return None
    return {
        "width": 1,
        "blocks": count(header, "blocks.", MAX_BLOCKS),
        "sizes": int(has(header, "time_extra_emb.style_embedder.")),
    }


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.hunyuandit.detect` finds them.
        prefix: of the file's keys.
    """
    width = facts["width"]
    table = {
        "text_embedding_padding": Piece(f"{prefix}text_embedding_padding"),
        "time_extra_emb.pooler.positional_embedding": Piece(f"{prefix}pooler.positional_embedding"),
    }
    if facts["sizes"]:
        table["time_extra_emb.style_embedder.weight"] = Piece(f"{prefix}style_embedder.weight")

    def layer(name: str, key: str, rows: tuple[int, int] | None = None, swapped: bool = False) -> None:
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Piece(f"{prefix}{key}.{kind}", rows, swapped)

    for name, key in WHOLE.items():
        layer(name, key)
    # The makers split this layer's output into shift and scale, diffusers into scale and shift.
    layer("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    for i in range(facts["blocks"]):
        block = f"blocks.{i}"
        for name, key in (BLOCK | (SKIP if i > facts["blocks"] // 2 else {})).items():
            layer(f"{block}.{name}", f"{block}.{key}")
        for key, names in FUSED.items():
            for part, name in enumerate(names):
                layer(f"{block}.{name}", f"{block}.{key}", rows=(part * width, (part + 1) * width))
    return table
