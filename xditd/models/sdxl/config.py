"""SDXL: what diffusers' UNet2DConditionModel is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families.sdxl import HEAD_DIM, RES_BLOCKS


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of UNet2DConditionModel.

    Args:
        facts: as `catalog.families.sdxl.detect` finds them.
    """
    levels = range(facts["levels"])
    channels = [facts[f"channels_{level}"] for level in levels]
    depths = [facts[f"depth_{level}"] for level in levels]
    crossed = ["CrossAttn" if depth else "" for depth in depths]
    return {
        "in_channels": facts["latent_channels"],
        "out_channels": facts["latent_channels"],
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in crossed),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(crossed)),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": RES_BLOCKS,
        # Of the last level's middle block as well: `reading.fill` sees that it is.
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths),
        "attention_head_dim": tuple(width // HEAD_DIM for width in channels),  # diffusers means the heads
        "cross_attention_dim": facts["context_width"],
        "use_linear_projection": True,
        # The whole vector as it comes, where diffusers' SDXL makes its second half of sizes itself.
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": facts["vector_width"],
    }
