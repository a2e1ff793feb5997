"""Small LoRAs in the forms of the trainers that people use: random, and seeded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from xditd.catalog.layouts import LAYOUTS
from xditd.models.making import write

FORMS = {
    "kohya": ("makers", "lora_unet_{_}", ".lora_up.weight", ".lora_down.weight", True),
    "bfl": ("makers", "{.}", ".lora_up.weight", ".lora_down.weight", True),
    "bfl-peft": ("makers", "diffusion_model.{.}", ".lora_B.weight", ".lora_A.weight", False),
    "makers-peft": ("makers", "base_model.model.{.}", ".lora_B.weight", ".lora_A.weight", False),
    "diffusers": ("diffusers", "transformer.{.}", ".lora_B.weight", ".lora_A.weight", False),
    "diffusers-unet": ("diffusers", "unet.{.}", ".lora.up.weight", ".lora.down.weight", False),
    "onetrainer": ("diffusers", "lora_transformer_{_}", ".lora_up.weight", ".lora_down.weight", True),
    "kohya-diffusers": ("diffusers", "lora_unet_{_}", ".lora_up.weight", ".lora_down.weight", True),
    "peft": ("diffusers", "base_model.model.{.}", ".lora_B.default.weight", ".lora_A.default.weight", False),
}
"""By name: the layout of its names, how it writes one ({.} with dots, {_} with underscores), what ends the keys of up and of
down, and whether it has an alpha."""


def make_lora(
    path: str | os.PathLike[str],
    family: str,
    facts: Mapping[str, int],
    form: str = "kohya",
    *,
    rank: int = 4,
    alpha: float = 2.0,
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a LoRA that changes every weight of a model.

    Args:
        family, facts: of the model.
        form: one of `FORMS`.
        size: how large its changes are beside the weights.
    """
    layout, pattern, up, down, with_alpha = FORMS[form]
    shapes = LAYOUTS[family].parameters(facts)
    if layout == "diffusers":
        pieces = LAYOUTS[family].pieces(facts, "")
        shapes = {name: piece.shape(shapes[piece.key]) for name, piece in pieces.items()}
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        if not key.endswith(".weight") or len(shape) < 2:
            continue
        name = key.removesuffix(".weight")
        module = pattern.replace("{.}", name).replace("{_}", name.replace(".", "_"))
        kernel = shape[2:]
        scale = size / math.prod(shape[1:]) ** 0.5
        ups = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator)
        downs = torch.randn(rank, shape[1], *kernel, generator=generator) * scale
        weights[module + up], weights[module + down] = ups.to(dtype), downs.to(dtype)
        if with_alpha:
            weights[module + ".alpha"] = torch.tensor(alpha)
    return write(path, weights)
