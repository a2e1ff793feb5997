"""Flux: what diffusers' FluxTransformer2DModel is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families.flux import PATCH


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of FluxTransformer2DModel.

    Args:
        facts: as `catalog.families.flux.detect` finds them.
    """
    return {
        "patch_size": 1,  # the latent is packed before it comes
        "in_channels": facts["latent_channels"] * PATCH**2,
        "num_layers": facts["double_blocks"],
        "num_single_layers": facts["single_blocks"],
        "attention_head_dim": facts["head_dim"],
        "num_attention_heads": facts["heads"],
        "joint_attention_dim": facts["context_width"],
        "pooled_projection_dim": facts["pooled_width"],
        "guidance_embeds": bool(facts["guidance"]),
        "axes_dims_rope": rope(facts["head_dim"]),
    }


def rope(head_dim: int) -> tuple[int, int, int]:
    """How a head's dimensions are shared out to (index, row, column): (16, 56, 56) of 128, so in any size."""
    side = 7 * head_dim // 16 // 2 * 2  # even: rotations take pairs
    return (head_dim - 2 * side, side, side)
