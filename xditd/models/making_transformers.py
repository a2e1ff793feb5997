"""Small transformers in the real file formats, beside Flux: see `making`, whose weights and writer these use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from xditd.catalog.families import hunyuandit, pixart, sd3, sdxl
from xditd.models.making import random_weights, write

Where = str | os.PathLike[str]


def sd3_facts(
    *,
    width: int = 256,
    blocks: int = 4,
    dual_blocks: int = 0,
    qk_norm: bool = False,
    positions: int = 24,
    context_width: int = 4096,
    pooled_width: int = 2048,
    latent_channels: int = 16,
) -> dict[str, int]:
    """What `catalog.families.sd3.detect` will find in such a file. ComfyUI reads it where width is 64 × blocks only."""
    return {
        "width": width,
        "heads": width // sd3.HEAD_DIM,
        "head_dim": sd3.HEAD_DIM,
        "blocks": blocks,
        "dual_blocks": dual_blocks,
        "qk_norm": int(qk_norm),
        "positions": positions,
        "context_width": context_width,
        "pooled_width": pooled_width,
        "latent_channels": latent_channels,
        "scale": sd3.SCALE,
    }


def make_sd3(
    path: Where,
    facts: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes an SD3 transformer, as ComfyUI's diffusion_models holds them; with qk_norm an SD3.5."""
    return write(path, random_weights(sd3.parameters(facts or sd3_facts()), dtype, seed, prefix))


def pixart_facts(
    *,
    width: int = 192,
    blocks: int = 2,
    context_width: int = 4096,
    text_tokens: int = 300,
    positions: int = 0,
    sizes: bool = False,
    latent_channels: int = 4,
) -> dict[str, int]:
    """What `catalog.families.pixart.detect` will find in such a file. ComfyUI reads a width of 1152 and a context_width
    of 4096 only."""
    return {
        "width": width,
        "heads": pixart.HEADS,
        "blocks": blocks,
        "context_width": context_width,
        "text_tokens": text_tokens,
        "positions": positions,
        "sizes": int(sizes),
        "latent_channels": latent_channels,
        "predicted_channels": 2 * latent_channels,
        "scale": pixart.SCALE,
    }


def make_pixart(
    path: Where,
    facts: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes a PixArt transformer, as ComfyUI's diffusion_models holds them; with sizes an α, else a Σ."""
    return write(path, random_weights(pixart.parameters(facts or pixart_facts()), dtype, seed, prefix))


def hunyuandit_facts(
    *,
    heads: int = 16,
    head_dim: int = 8,
    blocks: int = 4,
    ff: int = 512,
    context_width: int = 1024,
    t5_width: int = 2048,
    pooled_width: int = 1024,
    text_tokens: int = 77,
    t5_tokens: int = 256,
    sizes: bool = False,
    latent_channels: int = 4,
) -> dict[str, int]:
    """What `catalog.families.hunyuandit.detect` will find in such a file. ComfyUI reads 16 heads, an ff of four times the
    width, and texts of these widths only."""
    return {
        "width": heads * head_dim,
        "heads": heads,
        "head_dim": head_dim,
        "blocks": blocks,
        "ff": ff,
        "context_width": context_width,
        "t5_width": t5_width,
        "pooled_width": pooled_width,
        "text_tokens": text_tokens,
        "t5_tokens": t5_tokens,
        "sizes": int(sizes),
        "latent_channels": latent_channels,
        "predicted_channels": 2 * latent_channels,
        "scale": hunyuandit.SCALE,
    }


def make_hunyuandit(
    path: Where,
    facts: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes a HunyuanDiT transformer, as ComfyUI's diffusion_models holds them; with sizes a 1.1, else a 1.2."""
    return write(
        path, random_weights(hunyuandit.parameters(facts or hunyuandit_facts()), dtype, seed, prefix)
    )


def sdxl_facts(
    *,
    channels: tuple[int, ...] = (64, 128, 128),
    depths: tuple[int, ...] = (0, 1, 2),
    context_width: int = 2048,
    v: bool = False,
    zsnr: bool = False,
    latent_channels: int = 4,
) -> dict[str, int]:
    """What `catalog.families.sdxl.detect` will find in such a file."""
    return {
        "levels": len(channels),
        "middle_depth": depths[-1],
        "context_width": context_width,
        "vector_width": sdxl.VECTOR_WIDTH,
        "latent_channels": latent_channels,
        "v": int(v),
        "zsnr": int(zsnr),
        "scale": sdxl.SCALE,
        **{f"channels_{level}": width for level, width in enumerate(channels)},
        **{f"depth_{level}": depth for level, depth in enumerate(depths)},
    }


def make_sdxl(
    path: Where,
    facts: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes an SDXL UNet, as ComfyUI's diffusion_models holds them."""
    facts = facts or sdxl_facts()
    weights = random_weights(sdxl.parameters(facts), dtype, seed, prefix)
    marks = {"v_pred": facts["v"], "ztsnr": facts["zsnr"]}
    return write(path, weights | {name: torch.empty(0) for name, is_so in marks.items() if is_so})
