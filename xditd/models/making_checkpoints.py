"""Small all-in-one checkpoints in the formats that people have, beside Flux: see `making`, whose weights and writer these use."""

from __future__ import annotations

from pathlib import Path

import torch

from xditd.models.making import (
    Facts,
    Where,
    bert_facts,
    clip_facts,
    make_bert,
    make_clip,
    make_t5,
    make_vae,
    t5_facts,
    vae_facts,
    write,
)
from xditd.models.making_transformers import hunyuandit_facts, make_hunyuandit, make_sdxl, sdxl_facts

SD_VAE = vae_facts(latent_channels=4, quant=True)


def make_sdxl_checkpoint(
    path: Where,
    *,
    transformer: Facts | None = None,
    clip_l: Facts | None = None,
    clip_g: Facts | None = None,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Writes an SDXL checkpoint in its makers' layout: CLIP-L as transformers has it, without a projection, CLIP-G as
    OpenCLIP has it.

    Args:
        transformer: facts of `sdxl_facts`; None is its defaults.
        clip_l, clip_g: facts of `clip_facts`; None is small ones.
        seed: of the UNet; those of VAE, CLIP-L and CLIP-G are the next.
    """
    transformer = transformer or sdxl_facts(context_width=128)
    clip_l = clip_l or clip_facts(projection=False)
    clip_g = clip_g or clip_facts(layers=32, openclip=True)
    texts = "conditioner.embedders."
    weights = make_sdxl.weights(transformer, dtype=dtype, seed=seed, prefix="model.diffusion_model.")
    weights |= make_vae.weights(SD_VAE, dtype=dtype, seed=seed + 1, prefix="first_stage_model.")
    weights |= make_clip.weights(clip_l, dtype=dtype, seed=seed + 2, prefix=f"{texts}0.transformer.")
    weights |= make_clip.weights(clip_g, dtype=dtype, seed=seed + 3, prefix=f"{texts}1.model.")
    positions = torch.arange(clip_l["positions"])[None]
    weights[f"{texts}0.transformer.text_model.embeddings.position_ids"] = positions
    weights[f"{texts}1.model.logit_scale"] = torch.tensor(4.6052, dtype=dtype)
    return write(path, weights)


def make_hunyuandit_checkpoint(
    path: Where,
    *,
    transformer: Facts | None = None,
    hydit_clip: Facts | None = None,
    mt5xl: Facts | None = None,
    spiece_model: bytes = b"",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Writes a HunyuanDiT checkpoint as ComfyUI's hunyuan_dit_1.2.safetensors is.

    Args:
        transformer: facts of `hunyuandit_facts`; None is small ones that fit the texts.
        hydit_clip, mt5xl: facts of `bert_facts`, `t5_facts`; None is small ones.
        spiece_model: the tokenizer of mT5, as sentencepiece stores it.
        seed: of the transformer; those of VAE, BERT and mT5 are the next.
    """
    hydit_clip, mt5xl = hydit_clip or bert_facts(), mt5xl or t5_facts()
    transformer = transformer or hunyuandit_facts(context_width=hydit_clip["width"], t5_width=mt5xl["width"])
    weights = make_hunyuandit.weights(transformer, dtype=dtype, seed=seed, prefix="model.")
    weights |= make_vae.weights(SD_VAE, dtype=dtype, seed=seed + 1, prefix="vae.")
    weights |= make_bert.weights(
        hydit_clip, dtype=dtype, seed=seed + 2, prefix="text_encoders.hydit_clip.transformer."
    )
    weights |= make_t5.weights(mt5xl, dtype=dtype, seed=seed + 3, prefix="text_encoders.mt5xl.transformer.")
    for encoder in ("hydit_clip", "mt5xl"):
        weights[f"text_encoders.{encoder}.logit_scale"] = torch.tensor(4.6052, dtype=dtype)
    if spiece_model:
        weights["text_encoders.mt5xl.spiece_model"] = torch.frombuffer(
            bytearray(spiece_model), dtype=torch.uint8
        )
    return write(path, weights)
