"""HunyuanDiT 1.1 and 1.2 in ComfyUI's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import torch

from xditd.protocol.messages import ModelInfo

from .conditioning import needed

INPUTS = frozenset(
    {"text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"}
)
CLIP = "hunyuan_dit"
ENCODERS = ("hydit_clip", "mt5xl")
MULTIPLIER = None
BARE = False

patch_size = 2

SIZES = ("height", "width", "target_height", "target_width", "crop_top", "crop_left")
"""What an image_meta_size has, in its order."""


def comfy_config(info: ModelInfo) -> Any:
    early = bool(info.facts["sizes"])
    kind = comfy.supported_models.HunyuanDiT1 if early else comfy.supported_models.HunyuanDiT
    return kind({"image_model": "hydit1" if early else "hydit", "disable_unet_model_creation": True})


def conditioning(
    inputs: Mapping[str, Any], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """context [B, n, D] of BERT, that of mT5 [B, m, E] and their masks; image_meta_size [B, 6], the same numbers B times,
    which 1.1 alone heeds.

    Raises:
        XditError: `bad_tensor` without one of the texts or masks.
    """
    tensors = {
        "context": needed(inputs, "context", "text"),
        "mask": needed(inputs, "text_embedding_mask", "attention mask of a HunyuanDiT's CLIP"),
        "context_t5": needed(inputs, "encoder_hidden_states_t5", "mT5 text of a HunyuanDiT's CLIP"),
        "mask_t5": needed(inputs, "text_embedding_mask_t5", "mT5 mask of a HunyuanDiT's CLIP"),
    }
    sizes = inputs.get("image_meta_size")
    if not info.facts["sizes"] or sizes is None:
        return tensors, {}
    return tensors, dict(zip(SIZES, sizes[0].tolist(), strict=True))
