"""Small models in the real file formats, with seeded random weights: for tests, the demo and benchmarks.

The files are what a ComfyUI user has: makers' key names, safetensors, prefixes in a checkpoint. Weights are scaled
so that signals keep a standard deviation near 1 on their way: a prediction then differs clearly when x, t or the
conditioning differ, and an error anywhere shows in it.

    python -m xditd.models.making FOLDER
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from xditd.catalog.families import autoencoder_kl, flux

Weights = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def flux_facts(
    *,
    heads: int = 2,
    head_dim: int = 128,
    double_blocks: int = 2,
    single_blocks: int = 2,
    context_width: int = 4096,
    pooled_width: int = 768,
    latent_channels: int = 16,
    guidance: bool = True,
) -> dict[str, int]:
    """What `catalog.families.flux.detect` will find in such a file. ComfyUI reads it with a head_dim of 128 only."""
    return {
        "width": heads * head_dim,
        "heads": heads,
        "head_dim": head_dim,
        "double_blocks": double_blocks,
        "single_blocks": single_blocks,
        "context_width": context_width,
        "pooled_width": pooled_width,
        "latent_channels": latent_channels,
        "guidance": int(guidance),
        "scale": flux.SCALE,
    }


def vae_facts(
    *,
    width: int = 32,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    blocks: int = 2,
    latent_channels: int = 16,
    quant: bool = False,
) -> dict[str, int]:
    """What `catalog.families.autoencoder_kl.detect` will find in such a file. Widths are multiples of 32."""
    levels = {f"channels_{i}": width * multiple for i, multiple in enumerate(multiples)}
    return {
        "latent_channels": latent_channels,
        "scale": 2 ** (len(multiples) - 1),
        "channels": width,
        "levels": len(multiples),
        "blocks": blocks,
        "quant": int(quant),
        **levels,
    }


def flux_weights(
    facts: Mapping[str, int], *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, prefix: str = ""
) -> Weights:
    """Random weights of a Flux transformer, by the makers' keys."""
    return _random(flux.parameters(facts), dtype, seed, prefix)


def vae_weights(
    facts: Mapping[str, int], *, dtype: torch.dtype = torch.float32, seed: int = 0, prefix: str = ""
) -> Weights:
    """Random weights of an AutoencoderKL, by the makers' keys."""
    return _random(autoencoder_kl.parameters(facts), dtype, seed, prefix)


def make_flux(
    path: str | os.PathLike[str],
    *,
    heads: int = 2,
    head_dim: int = 128,
    double_blocks: int = 2,
    single_blocks: int = 2,
    context_width: int = 4096,
    pooled_width: int = 768,
    latent_channels: int = 16,
    guidance: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes a Flux transformer, as ComfyUI's diffusion_models holds them; `guidance` makes it a dev, else a schnell."""
    facts = flux_facts(
        heads=heads,
        head_dim=head_dim,
        double_blocks=double_blocks,
        single_blocks=single_blocks,
        context_width=context_width,
        pooled_width=pooled_width,
        latent_channels=latent_channels,
        guidance=guidance,
    )
    return _write(path, flux_weights(facts, dtype=dtype, seed=seed, prefix=prefix))


def make_vae(
    path: str | os.PathLike[str],
    *,
    width: int = 32,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    blocks: int = 2,
    latent_channels: int = 16,
    quant: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    prefix: str = "",
) -> Path:
    """Writes an AutoencoderKL, as ComfyUI's vae holds them: Flux's layout, or with `quant` and 4 channels SD's."""
    facts = vae_facts(
        width=width, multiples=multiples, blocks=blocks, latent_channels=latent_channels, quant=quant
    )
    return _write(path, vae_weights(facts, dtype=dtype, seed=seed, prefix=prefix))


def make_checkpoint(
    path: str | os.PathLike[str],
    *,
    transformer: Mapping[str, int] | None = None,
    vae: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes a Flux checkpoint, as ComfyUI's checkpoints holds them: transformer, VAE and part of a text encoder.

    Args:
        path: of the file.
        transformer: facts of `flux_facts`; None is its defaults.
        vae: facts of `vae_facts`; None is its defaults.
        dtype: of all.
        seed: of the transformer; the VAE's is the next.
    """
    weights = flux_weights(
        transformer or flux_facts(), dtype=dtype, seed=seed, prefix="model.diffusion_model."
    )
    weights |= vae_weights(vae or vae_facts(), dtype=dtype, seed=seed + 1, prefix="vae.")
    weights["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6052, dtype=dtype)
    return _write(path, weights)


def make_models(folder: str | os.PathLike[str]) -> list[Path]:
    """Writes a models folder as ComfyUI's, with a small dev, a small schnell, a VAE and a checkpoint."""
    root = Path(folder)
    return [
        make_flux(root / "diffusion_models" / "flux-dev-small.safetensors"),
        make_flux(root / "diffusion_models" / "flux-schnell-small.safetensors", guidance=False, seed=1),
        make_vae(root / "vae" / "ae-small.safetensors", seed=2),
        make_checkpoint(root / "checkpoints" / "flux-dev-small-all-in-one.safetensors", seed=3),
    ]


def _random(shapes: Shapes, dtype: torch.dtype, seed: int, prefix: str) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation

    weights = {}
    for key, shape in shapes.items():
        if key.endswith(".scale") or (".norm" in key and key.endswith(".weight")):
            value = 1 + normal(shape, 0.1)
        elif key.endswith(".bias"):
            value = normal(shape, 0.1)
        else:
            value = normal(shape, _gain(key) / math.sqrt(math.prod(shape[1:])))
        weights[prefix + key] = value.to(dtype)
    return weights


def _gain(key: str) -> float:
    """What a layer's output is to be against its input. Modulation follows a SiLU of sums, hence more than 1."""
    if "_mod." in key or "modulation." in key or "adaLN" in key:
        return 1.5
    return 1.0


def _write(path: str | os.PathLike[str], weights: Weights) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m xditd.models.making FOLDER")
    for written in make_models(sys.argv[1]):
        print(f"{written.stat().st_size / 2**20:8.1f} MiB  {written}")
