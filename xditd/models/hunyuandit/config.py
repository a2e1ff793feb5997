"""HunyuanDiT: what diffusers' HunyuanDiT2DModel is told, and where its patches are. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families.hunyuandit import PATCH

BASE = 32
"""Patches to a side of the square of positions that every picture is fitted into: one of 512 pixels."""


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of HunyuanDiT2DModel.

    Args:
        facts: as `catalog.families.hunyuandit.detect` finds them.
    """
    return {
        "num_attention_heads": facts["heads"],
        "attention_head_dim": facts["head_dim"],
        "in_channels": facts["latent_channels"],
        "patch_size": PATCH,
        "hidden_size": facts["width"],
        "num_layers": facts["blocks"],
        "mlp_ratio": (facts["ff"] + 0.5) / facts["width"],  # diffusers rounds the product down
        "learn_sigma": facts["predicted_channels"] > facts["latent_channels"],
        "cross_attention_dim": facts["context_width"],
        "cross_attention_dim_t5": facts["t5_width"],
        "pooled_projection_dim": facts["pooled_width"],
        "text_len": facts["text_tokens"],
        "text_len_t5": facts["t5_tokens"],
        "use_style_cond_and_image_meta_size": bool(facts["sizes"]),
    }


def spans(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """From where to where the rows and the columns of a picture's patches lie, once it is fitted into the base square.

    The longer side fills it, the shorter is in its middle, rounded to whole positions: as HunyuanDiT's makers have it
    (Apache-2.0 in diffusers: `get_resize_crop_region_for_grid`).
    """
    longest = max(rows, columns)
    sizes = [BASE if side == longest else round(BASE / longest * side) for side in (rows, columns)]
    begins = [round((BASE - size) / 2.0) for size in sizes]
    return (begins[0], begins[0] + sizes[0]), (begins[1], begins[1] + sizes[1])
