"""PixArt: what diffusers' PixArtTransformer2DModel is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families.pixart import PATCH, UNIT


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of PixArtTransformer2DModel.

    Args:
        facts: as `catalog.families.pixart.detect` finds them.
    """
    return {
        "num_attention_heads": facts["heads"],
        "attention_head_dim": facts["width"] // facts["heads"],
        "in_channels": facts["latent_channels"],
        "out_channels": facts["predicted_channels"],
        "num_layers": facts["blocks"],
        "cross_attention_dim": facts["width"],
        "patch_size": PATCH,
        "sample_size": UNIT,  # of positions that are not used
        "caption_channels": facts["context_width"],
        "use_additional_conditions": bool(facts["sizes"]),
    }


def scales(facts: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """How positions are measured: how many there are to a side of a picture of the latent's size, and what divides them.

    As ComfyUI has it: the latent's mean side counts, rounded to pictures of 512; what divides is that of the picture
    whose positions a file carries, or else of the latent.
    """
    pictures = round((height + width) // 2 / UNIT)
    base = pictures * UNIT // PATCH
    return base, facts["positions"] * PATCH // UNIT or pictures
