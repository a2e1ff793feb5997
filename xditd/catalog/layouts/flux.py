"""Flux: which parameter of diffusers' FluxTransformer2DModel comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: `convert_flux_transformer_checkpoint_to_diffusers` in
diffusers/loaders/single_file_utils.py), which holds for a width of 3072 only; here the widths are the file's. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.expected import count, has
from xditd.catalog.families.flux import MAX_BLOCKS
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
"""Linear layers (weight and bias) outside the blocks."""

GUIDANCE = {
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
"""Those that only distilled models (dev) have."""

DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
"""Linear layers of a double block."""

DOUBLE_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers that the files hold as one, in thirds."""

DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}

SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
"""Linear layers of a single block."""

SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout, but for widths; None where it is no Flux."""
    if (
        "single_transformer_blocks.0.proj_mlp.weight" not in header.tensors
        or "x_embedder.weight" not in header.tensors
    ):
        return None
    return {
        "width": 1,
        "guidance": int(has(header, "time_text_embed.guidance_embedder.")),
        "double_blocks": count(header, "transformer_blocks.", MAX_BLOCKS),
        "single_blocks": count(header, "single_transformer_blocks.", MAX_BLOCKS),
    }


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.flux.detect` finds them.
        prefix: of the file's keys.
    """
    width = facts["width"]
    table: dict[str, Piece] = {}

    def linear(name: str, key: str, rows: tuple[int, int] | None = None, swapped: bool = False) -> None:
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Piece(f"{prefix}{key}.{kind}", rows, swapped)

    def norm(name: str, key: str) -> None:
        table[f"{name}.weight"] = Piece(f"{prefix}{key}.scale")

    for name, key in (WHOLE | GUIDANCE if facts["guidance"] else WHOLE).items():
        linear(name, key)
    # The makers split this layer's output into shift and scale, diffusers into scale and shift.
    linear("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    for i in range(facts["double_blocks"]):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for name, key in DOUBLE.items():
            linear(f"{ours}.{name}", f"{theirs}.{key}")
        for key, names in DOUBLE_QKV.items():
            for third, name in enumerate(names):
                linear(f"{ours}.{name}", f"{theirs}.{key}", rows=(third * width, (third + 1) * width))
        for name, key in DOUBLE_NORMS.items():
            norm(f"{ours}.{name}", f"{theirs}.{key}")
    for i in range(facts["single_blocks"]):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for name, key in SINGLE.items():
            linear(f"{ours}.{name}", f"{theirs}.{key}")
        for third, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            linear(f"{ours}.{name}", f"{theirs}.linear1", rows=(third * width, (third + 1) * width))
        linear(f"{ours}.proj_mlp", f"{theirs}.linear1", rows=(3 * width, 7 * width))
        for name, key in SINGLE_NORMS.items():
            norm(f"{ours}.{name}", f"{theirs}.{key}")
    return table
