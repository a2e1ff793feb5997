"""PixArt-α and PixArt-Σ in ComfyUI's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import torch

from xditd.protocol.messages import ModelInfo

from .conditioning import needed

INPUTS = frozenset({"c_size", "c_ar"})
CLIP = "pixart"
ENCODERS: tuple[str, ...] = ()  # no checkpoint has one
MULTIPLIER = None
BARE = False

patch_size = 2


def comfy_config(info: ModelInfo) -> Any:
    alpha = info.variant == "alpha"
    kind = comfy.supported_models.PixArtAlpha if alpha else comfy.supported_models.PixArtSigma
    return kind({"image_model": f"pixart_{info.variant}", "disable_unet_model_creation": True})


def conditioning(
    inputs: Mapping[str, Any], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """context [B, n, D]; c_size [B, 2] and c_ar [B, 1], the same numbers B times, which α alone heeds.

    Raises:
        XditError: `bad_tensor` without a context.
    """
    tensors, values = {"context": needed(inputs, "context", "text")}, {}
    size, ratio = inputs.get("c_size"), inputs.get("c_ar")
    if info.facts["sizes"] and size is not None and ratio is not None:
        values = {"height": float(size[0, 0]), "width": float(size[0, 1]), "aspect_ratio": float(ratio[0, 0])}
    return tensors, values
