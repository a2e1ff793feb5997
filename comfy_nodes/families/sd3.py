"""Stable Diffusion 3 and 3.5 in ComfyUI's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import torch

from xditd.protocol.messages import ModelInfo

from .conditioning import needed

INPUTS = frozenset({"y"})
CLIP = "sd3"
ENCODERS = ("clip_l", "clip_g", "t5xxl")
MULTIPLIER = 1000.0
BARE = True

patch_size = 2


def comfy_config(info: ModelInfo) -> Any:
    return comfy.supported_models.SD3(
        {
            "in_channels": info.facts["latent_channels"],
            "pos_embed_scaling_factor": None,
            "disable_unet_model_creation": True,
        }
    )


def conditioning(
    inputs: Mapping[str, Any], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """context [B, n, D]; y [B, P].

    Raises:
        XditError: `bad_tensor` without one of them.
    """
    return {
        "context": needed(inputs, "context", "text"),
        "pooled": needed(inputs, "y", "pooled output of a CLIP"),
    }, {}
