"""SDXL: which parameter of diffusers' UNet2DConditionModel comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: `convert_ldm_unet_checkpoint` in diffusers/loaders/single_file_utils.py).
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.expected import count, has, shape
from xditd.catalog.families.sdxl import MAX_BLOCKS, MAX_DEPTH, RES_BLOCKS, VECTOR_WIDTH, parameters
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
"""By the files' modules, diffusers'."""

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Layers of a residual block; those of transformers have the same names."""


RENAMED = {"class_embedding.": "add_embedding."}
"""What files in diffusers' layout call the embedding of the vector, which our network takes as one piece."""


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout; None where it is no SDXL base UNet, whole."""
    first = header.tensors.get("add_embedding.linear_1.weight")
    if first is None or first.shape[1:] != (VECTOR_WIDTH,) or "conv_in.weight" not in header.tensors:
        return None
    if not has(header, "mid_block.attentions.0.transformer_blocks."):
        return None
    levels = count(header, "down_blocks.", MAX_BLOCKS)
    facts = {
        "levels": levels,
        "middle_depth": count(header, "mid_block.attentions.0.transformer_blocks.", MAX_DEPTH),
        "context_width": 1,
        "vector_width": VECTOR_WIDTH,
        "latent_channels": 1,
    }
    for level in range(levels):
        block = f"down_blocks.{level}"
        inside = f"{block}.attentions.0.transformer_blocks."
        facts[f"channels_{level}"] = shape(header, f"{block}.resnets.0.conv1.weight", 4)[0]
        facts[f"depth_{level}"] = count(header, inside, MAX_DEPTH) if has(header, inside) else 0
    return facts


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.sdxl.detect` finds them.
        prefix: of the file's keys.
    """
    modules = WHOLE | _blocks(facts)
    table = {}
    for key in parameters(facts):
        module = next(module for module in _above(key) if module in modules)
        inner, _, kind = key[len(module) + 1 :].rpartition(".")
        name = ".".join(part for part in (modules[module], RESNET.get(inner, inner), kind) if part)
        table[name] = Piece(prefix + key)
    return table


def _blocks(facts: Mapping[str, int]) -> dict[str, str]:
    """The modules of the ways down and up."""
    levels, each = facts["levels"], RES_BLOCKS + 1
    table = {}
    for level in range(levels):
        for i in range(each):
            down, up = f"input_blocks.{1 + level * each + i}", f"output_blocks.{level * each + i}"
            ours = f"down_blocks.{level}"
            table[f"{down}.0"] = f"{ours}.resnets.{i}"
            table[f"{down}.0.op"] = f"{ours}.downsamplers.0.conv"
            table[f"{down}.1"] = f"{ours}.attentions.{i}"
            ours = f"up_blocks.{level}"
            table[f"{up}.0"] = f"{ours}.resnets.{i}"
            table[f"{up}.1"] = f"{ours}.attentions.{i}"
            for place in (1, 2):  # after a transformer, where there is one
                table[f"{up}.{place}.conv"] = f"{ours}.upsamplers.0.conv"
    return table


def _above(key: str) -> list[str]:
    """The modules that a parameter is in, the innermost first."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
