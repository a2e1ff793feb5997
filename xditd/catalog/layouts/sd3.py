"""SD3: which parameter of diffusers' SD3Transformer2DModel comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: `convert_sd3_transformer_checkpoint_to_diffusers` in
diffusers/loaders/single_file_utils.py). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.expected import count, has
from xditd.catalog.families.sd3 import MAX_BLOCKS
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
"""Layers (weight and bias) outside the blocks."""

IMAGE = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
}
"""Linear layers of a block, for image tokens."""

TEXT = {
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
"""Those for text tokens, which the last block has not."""

QKV = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers that the files hold as one, in thirds."""

NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}

DUAL = {"attn2.to_out.0": "x_block.attn2.proj"}
DUAL_QKV = {"x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v")}
DUAL_NORMS = {"attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k"}
"""What a block has that attends to the image once more."""


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout, but for widths; None where it is no SD3."""
    if (
        "transformer_blocks.0.attn.add_q_proj.weight" not in header.tensors
        or "pos_embed.proj.weight" not in header.tensors
    ):
        return None
    blocks = count(header, "transformer_blocks.", MAX_BLOCKS)
    return {
        "width": 1,
        "blocks": blocks,
        "dual_blocks": sum(has(header, f"transformer_blocks.{i}.attn2.") for i in range(blocks)),
        "qk_norm": int(has(header, "transformer_blocks.0.attn.norm_q.")),
    }


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.sd3.detect` finds them.
        prefix: of the file's keys.
    """
    width, last = facts["width"], facts["blocks"] - 1
    table = {"pos_embed.pos_embed": Piece(f"{prefix}pos_embed")}

    def linear(name: str, key: str, rows: tuple[int, int] | None = None, swapped: bool = False) -> None:
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Piece(f"{prefix}{key}.{kind}", rows, swapped)

    for name, key in WHOLE.items():
        linear(name, key)
    # The makers split this layer's output into shift and scale, diffusers into scale and shift.
    linear("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    for i in range(facts["blocks"]):
        ours, theirs, dual = f"transformer_blocks.{i}", f"joint_blocks.{i}", i < facts["dual_blocks"]
        for name, key in (IMAGE | (TEXT if i < last else {}) | (DUAL if dual else {})).items():
            linear(f"{ours}.{name}", f"{theirs}.{key}")
        if i == last:
            linear(f"{ours}.norm1_context.linear", f"{theirs}.context_block.adaLN_modulation.1", swapped=True)
        for key, names in (QKV | (DUAL_QKV if dual else {})).items():
            for third, name in enumerate(names):
                linear(f"{ours}.{name}", f"{theirs}.{key}.qkv", rows=(third * width, (third + 1) * width))
        if facts["qk_norm"]:
            for name, key in (NORMS | (DUAL_NORMS if dual else {})).items():
                table[f"{ours}.{name}.weight"] = Piece(f"{prefix}{theirs}.{key}.weight")
    return table
