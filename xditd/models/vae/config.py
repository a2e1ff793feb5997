"""AutoencoderKL: what diffusers' class is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of AutoencoderKL.

    Args:
        facts: as `catalog.families.autoencoder_kl.detect` finds them.
    """
    levels = facts["levels"]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(facts[f"channels_{i}"] for i in range(levels)),
        "layers_per_block": facts["blocks"],
        "latent_channels": facts["latent_channels"],
        "norm_num_groups": 32,  # in every file of this layout; shapes do not tell it
        "use_quant_conv": bool(facts["quant"]),
        "use_post_quant_conv": bool(facts["quant"]),
    }
