"""Conditionings as CLIPTextEncode makes them, without a text encoder."""

from __future__ import annotations

from typing import Any

import torch

from tests.comfy.inside.conftest import FLUX


def text(seed: int, length: int = 24, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, length, FLUX["context_width"], generator=generator)
    pooled = torch.randn(1, FLUX["pooled_width"], generator=generator)
    return [[context, {"pooled_output": pooled, **options}]]


def latent(batch: int = 1, height: int = 12, width: int = 10, seed: int | None = None) -> dict[str, Any]:
    if seed is None:
        return {"samples": torch.zeros(batch, 16, height, width)}
    return {"samples": torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))}
