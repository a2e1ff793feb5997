"""Flux.1 dev and schnell in ComfyUI's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import torch

from xditd.protocol.messages import ModelInfo

from .conditioning import needed

INPUTS = frozenset({"y", "guidance"})
CLIP = "flux"
ENCODERS = ("clip_l", "t5xxl")
MULTIPLIER = 1.0
BARE = True

patch_size = 2


def comfy_config(info: ModelInfo) -> Any:
    facts = info.facts
    settings = {
        "image_model": "flux",
        "in_channels": facts["latent_channels"],
        "out_channels": facts["latent_channels"],
        "patch_size": patch_size,
        "vec_in_dim": facts["pooled_width"],
        "context_in_dim": facts["context_width"],
        "hidden_size": facts["width"],
        "guidance_embed": bool(facts["guidance"]),
        "disable_unet_model_creation": True,
    }
    kind = comfy.supported_models.Flux if facts["guidance"] else comfy.supported_models.FluxSchnell
    return kind(settings)


def conditioning(
    inputs: Mapping[str, Any], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """context [B, n, D]; y [B, P], zeros where there is none, as in ComfyUI's Flux; guidance [B], the same number B times.

    Raises:
        XditError: `bad_tensor` without a context.
    """
    context = needed(inputs, "context", "text")
    pooled, guidance = inputs.get("y"), inputs.get("guidance")
    if pooled is None:
        pooled = context.new_zeros(context.shape[0], info.facts["pooled_width"])
    values = {} if guidance is None else {"guidance": float(guidance[0])}
    return {"context": context, "pooled": pooled}, values
