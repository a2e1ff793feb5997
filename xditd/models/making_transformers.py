"""Small transformers in the real file formats, beside Flux: see `making`, whose weights and writer these use."""

from __future__ import annotations

import torch

from xditd.catalog.families import hunyuandit, pixart, sd3, sdxl
from xditd.models.making import Facts, Maker


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


make_sd3 = Maker(sd3_facts, sd3.parameters, torch.float16)
"""SD3; with qk_norm an SD3.5."""


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


make_pixart = Maker(pixart_facts, pixart.parameters, torch.float16)
"""PixArt; with sizes an α, else a Σ."""


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


make_hunyuandit = Maker(hunyuandit_facts, hunyuandit.parameters, torch.float16)
"""HunyuanDiT; with sizes a 1.1, else a 1.2."""


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


def _marks(facts: Facts) -> list[str]:
    return [name for name, fact in (("v_pred", "v"), ("ztsnr", "zsnr")) if facts[fact]]


make_sdxl = Maker(sdxl_facts, sdxl.parameters, torch.float16, _marks)
"""The SDXL base UNet."""
