"""SDXL in ComfyUI's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.supported_models
import torch

from xditd.protocol.messages import ModelInfo

from .conditioning import needed

INPUTS = frozenset({"y"})
CLIP = "sdxl"
ENCODERS = ("clip_l", "clip_g")
MULTIPLIER = None
BARE = False

patch_size = 1


def comfy_config(info: ModelInfo) -> Any:
    facts = info.facts
    config = comfy.supported_models.SDXL(
        {
            "in_channels": facts["latent_channels"],
            "model_channels": facts["channels_0"],
            "context_dim": facts["context_width"],
            "adm_in_channels": facts["vector_width"],
            "disable_unet_model_creation": True,
        }
    )
    if facts["v"]:  # ComfyUI would see it by a key of the file
        config.model_type = lambda state_dict, prefix="": comfy.model_base.ModelType.V_PREDICTION
    if facts["zsnr"]:
        config.sampling_settings["zsnr"] = True
    return config


def conditioning(
    inputs: Mapping[str, Any], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """context [B, n, D]; y [B, V]: the pooled text and six sizes, as ComfyUI's model makes it.

    Raises:
        XditError: `bad_tensor` without one of them.
    """
    return {
        "context": needed(inputs, "context", "text"),
        "vector": needed(inputs, "y", "pooled output of a CLIP"),
    }, {}
