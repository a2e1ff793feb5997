"""PixArt: which parameter of diffusers' PixArtTransformer2DModel comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: scripts/convert_pixart_sigma_to_diffusers.py). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.expected import count, has
from xditd.catalog.families.pixart import MAX_BLOCKS
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
}
"""Layers (weight and bias) outside the blocks."""

SIZES = {
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
}
"""Those of models that are conditioned on sizes."""

BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
"""Linear layers of a block."""

FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
"""Layers that the files hold as one, in equal parts."""


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout, but for widths; None where it is no PixArt."""
    marks = (
        "adaln_single.emb.timestep_embedder.linear_1.weight",
        "caption_projection.linear_1.weight",
        "pos_embed.proj.weight",
    )
    if any(mark not in header.tensors for mark in marks):
        return None
    return {
        "width": 1,
        "blocks": count(header, "transformer_blocks.", MAX_BLOCKS),
        "sizes": int(has(header, "adaln_single.emb.resolution_embedder.")),
    }


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.pixart.detect` finds them.
        prefix: of the file's keys.
    """
    width = facts["width"]
    table = {"scale_shift_table": Piece(f"{prefix}final_layer.scale_shift_table")}

    def linear(name: str, key: str, rows: tuple[int, int] | None = None) -> None:
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Piece(f"{prefix}{key}.{kind}", rows)

    for name, key in (WHOLE | SIZES if facts["sizes"] else WHOLE).items():
        linear(name, key)
    for i in range(facts["blocks"]):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        table[f"{ours}.scale_shift_table"] = Piece(f"{prefix}{theirs}.scale_shift_table")
        for name, key in BLOCK.items():
            linear(f"{ours}.{name}", f"{theirs}.{key}")
        for key, names in FUSED.items():
            for part, name in enumerate(names):
                linear(f"{ours}.{name}", f"{theirs}.{key}", rows=(part * width, (part + 1) * width))
    return table
