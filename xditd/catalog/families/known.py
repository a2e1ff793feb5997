"""Files that people have and this version does not run, by keys, so that a refusal can name what they are.

A row is what a sentence calls it, and the keys that such a file has; a key that begins with "*" stands for any
key with that ending. The first row that fits wins.
"""

from __future__ import annotations

from xditd.catalog.header import Header

Rows = tuple[tuple[str, tuple[str, ...]], ...]

LOOKALIKES: Rows = (
    ("a LoRA", ("*.lora_A.weight",)),
    ("a LoRA", ("*.lora_up.weight",)),
    ("a LoRA", ("*.lora.up.weight",)),
    ("a ControlNet", ("controlnet_blocks.0.weight",)),
    ("a ControlNet", ("controlnet_cond_embedding.conv_in.weight",)),
    ("a ControlNet", ("control_model.time_embed.0.weight",)),
    ("a Flux.2 transformer", ("double_stream_modulation_img.lin.weight",)),
    ("a Chroma transformer", ("distilled_guidance_layer.norms.0.scale",)),
    ("a Chroma transformer", ("distilled_guidance_layer.0.norms.0.scale",)),
    ("a HunyuanVideo transformer", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
)  # fmt: skip
"""Files that have the keys of a family we run among their own: asked before any family is."""

OTHERS: Rows = (
    ("a Wan transformer", ("head.modulation", "blocks.0.cross_attn.q.weight")),
    ("a Qwen-Image transformer", ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("a Z-Image or Lumina 2 transformer", ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")),
    ("an LTX-Video transformer", ("patchify_proj.weight",)),
    ("a HiDream transformer", ("caption_projection.0.linear.weight",)),
    ("a Mochi transformer", ("t5_yproj.weight",)),
    ("an AuraFlow transformer", ("double_layers.0.attn.w1q.weight",)),
    ("an SDXL refiner or another UNet with labels", ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    ("an SD1 or SD2 UNet", ("input_blocks.0.0.weight",)),
    ("an SD1 or SD2 UNet, an SDXL refiner or a distilled SDXL in diffusers' layout", ("down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")),
    ("a video VAE in diffusers' layout", ("decoder.up_blocks.0.resnets.0.norm1.weight",)),
    ("a Wan or Qwen-Image VAE", ("decoder.middle.0.residual.0.gamma",)),
    ("a video VAE", ("decoder.conv_in.conv.weight",)),
    ("a TAESD preview decoder", ("1.weight", "3.conv.0.weight")),
    ("a TAESD VAE", ("taesd_decoder.1.weight",)),
    ("a language model", ("model.layers.0.self_attn.q_proj.weight",)),
)  # fmt: skip


def name_of(header: Header, prefixes: tuple[str, ...], rows: Rows = LOOKALIKES + OTHERS) -> str:
    """What the file holds under one of the prefixes ("an SDXL UNet"), or "" where no row fits."""
    for label, keys in rows:
        for prefix in prefixes:
            if all(_has(header, prefix, key) for key in keys):
                return label
    return ""


def _has(header: Header, prefix: str, key: str) -> bool:
    if key.startswith("*"):
        return any(held.startswith(prefix) and held.endswith(key[1:]) for held in header.tensors)
    return prefix + key in header.tensors
