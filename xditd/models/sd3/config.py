"""SD3: what diffusers' SD3Transformer2DModel is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families.sd3 import PATCH


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of SD3Transformer2DModel.

    Args:
        facts: as `catalog.families.sd3.detect` finds them.
    """
    return {
        "patch_size": PATCH,
        "in_channels": facts["latent_channels"],
        "out_channels": facts["latent_channels"],
        "num_layers": facts["blocks"],
        "attention_head_dim": facts["head_dim"],
        "num_attention_heads": facts["heads"],
        "joint_attention_dim": facts["context_width"],
        "caption_projection_dim": facts["width"],
        "pooled_projection_dim": facts["pooled_width"],
        "pos_embed_max_size": facts["positions"],
        "dual_attention_layers": tuple(range(facts["dual_blocks"])),
        "qk_norm": "rms_norm" if facts["qk_norm"] else None,
    }
