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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xditd.catalog.families import autoencoder_kl, bert, clip, flux, t5

Where = str | os.PathLike[str]
Facts = Mapping[str, int]
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


def clip_facts(
    *,
    width: int = 64,
    layers: int = 2,
    vocabulary: int = clip.END + 1,
    positions: int = 77,
    projection: bool = True,
    openclip: bool = False,
) -> dict[str, int]:
    """What `catalog.families.clip.detect` will find in such a file; more than 30 layers make it a CLIP-G."""
    return {
        "width": width,
        "layers": layers,
        "heads": max(1, width // clip.HEAD_DIM),
        "vocabulary": vocabulary,
        "positions": positions,
        "intermediate": 4 * width,
        "projection": int(projection),
        "openclip": int(openclip),
    }


def t5_facts(
    *,
    width: int = 128,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    vocabulary: int = 32128,
    gated: bool = True,
) -> dict[str, int]:
    """What `catalog.families.t5.detect` will find in such a file."""
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "ff": 2 * width,
        "vocabulary": vocabulary,
        "gated": int(gated),
    }


def bert_facts(
    *, width: int = 64, layers: int = 2, vocabulary: int = 47020, positions: int = 512
) -> dict[str, int]:
    """What `catalog.families.bert.detect` will find in such a file."""
    return {
        "width": width,
        "layers": layers,
        "heads": max(1, width // bert.HEAD_DIM),
        "vocabulary": vocabulary,
        "positions": positions,
        "types": 2,
        "intermediate": 4 * width,
    }


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes small files of one family.

    Attributes:
        facts: from a shape to what the family's `detect` will find.
        parameters: the family's.
        dtype: that its files usually have.
        marks: keys without a value, and without a prefix, that files with these facts have.
    """

    facts: Callable[..., dict[str, int]]
    parameters: Callable[[Facts], dict[str, tuple[int, ...]]]
    dtype: torch.dtype
    marks: Callable[[Facts], Iterable[str]] = lambda facts: ()

    def weights(
        self, facts: Facts, *, dtype: torch.dtype | None = None, seed: int = 0, prefix: str = ""
    ) -> Weights:
        """Random weights of a network with these facts, by the makers' keys."""
        made = random_weights(self.parameters(facts), dtype or self.dtype, seed, prefix)
        return made | {mark: torch.empty(0) for mark in self.marks(facts)}

    def __call__(
        self,
        path: Where,
        facts: Facts | None = None,
        *,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        prefix: str = "",
        **shape: Any,
    ) -> Path:
        """Writes a file, as ComfyUI's folder for the family holds them.

        Args:
            path: of the file.
            facts: as `facts` gives them; None is those of `shape`.
            dtype: of all weights; None is the usual one.
            seed: of the weights.
            prefix: of the keys.
            shape: as `facts` takes it.

        Raises:
            TypeError: both facts and a shape.
        """
        if facts is not None and shape:
            raise TypeError(f"{', '.join(shape)} beside facts, which say all of the network's shape")
        found = self.facts(**shape) if facts is None else facts
        return write(path, self.weights(found, dtype=dtype, seed=seed, prefix=prefix))


make_flux = Maker(flux_facts, flux.parameters, torch.bfloat16)
"""Flux; `guidance` makes it a dev, else a schnell."""

make_vae = Maker(vae_facts, autoencoder_kl.parameters, torch.float32)
"""AutoencoderKL: Flux's layout, or with `quant` and 4 channels SD's."""

make_clip = Maker(clip_facts, clip.parameters, torch.float16)
"""CLIP's text encoders, in transformers' layout or with `openclip` in OpenCLIP's."""

make_t5 = Maker(t5_facts, t5.parameters, torch.float16)
"""T5's encoder; `gated` as every T5 since 1.1 is."""

make_bert = Maker(bert_facts, bert.parameters, torch.float16)
"""BERT's text encoder."""


def make_checkpoint(
    path: Where,
    *,
    transformer: Facts | None = None,
    vae: Facts | None = None,
    clip_l: Facts | None = None,
    t5xxl: Facts | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes a Flux checkpoint, as ComfyUI's checkpoints holds them: transformer, VAE and, where wanted, text encoders.

    Args:
        path: of the file.
        transformer: facts of `flux_facts`; None is its defaults.
        vae: facts of `vae_facts`; None is its defaults.
        clip_l, t5xxl: facts of `clip_facts`, `t5_facts`; None leaves the encoder out.
        dtype: of all.
        seed: of the transformer; those of VAE, CLIP and T5 are the next.
    """
    weights = make_flux.weights(
        transformer or flux_facts(), dtype=dtype, seed=seed, prefix="model.diffusion_model."
    )
    weights |= make_vae.weights(vae or vae_facts(), dtype=dtype, seed=seed + 1, prefix="vae.")
    if clip_l is not None:
        start = "text_encoders.clip_l.transformer."
        weights |= make_clip.weights(clip_l, dtype=dtype, seed=seed + 2, prefix=start)
    if t5xxl is not None:
        start = "text_encoders.t5xxl.transformer."
        weights |= make_t5.weights(t5xxl, dtype=dtype, seed=seed + 3, prefix=start)
    weights["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6052, dtype=dtype)
    return write(path, weights)


def make_models(folder: Where) -> list[Path]:
    """Writes a models folder as ComfyUI's, with a small dev, a small schnell, a VAE and a checkpoint."""
    root = Path(folder)
    return [
        make_flux(root / "diffusion_models" / "flux-dev-small.safetensors"),
        make_flux(root / "diffusion_models" / "flux-schnell-small.safetensors", guidance=False, seed=1),
        make_vae(root / "vae" / "ae-small.safetensors", seed=2),
        make_checkpoint(root / "checkpoints" / "flux-dev-small-all-in-one.safetensors", seed=3),
    ]


def make_text_models(folder: Where) -> list[Path]:
    """Writes a models folder with text encoders, a dev that fits them and a VAE: each alone, and all in a checkpoint.

    The weights of the checkpoint are those of the files, but for their rounding to its dtype.
    """
    root = Path(folder)
    clip_l, t5xxl = clip_facts(), t5_facts()
    context, pooled = t5xxl["width"], clip_l["width"]
    return [
        make_clip(root / "text_encoders" / "clip_l.safetensors", seed=4),
        make_t5(root / "text_encoders" / "t5xxl.safetensors", seed=5),
        make_flux(
            root / "diffusion_models" / "flux-small.safetensors",
            context_width=context,
            pooled_width=pooled,
            seed=2,
        ),
        make_vae(root / "vae" / "ae-small.safetensors", seed=3),
        make_checkpoint(
            root / "checkpoints" / "flux-small.safetensors",
            transformer=flux_facts(context_width=context, pooled_width=pooled),
            clip_l=clip_l,
            t5xxl=t5xxl,
            seed=2,
        ),
    ]


def random_weights(shapes: Shapes, dtype: torch.dtype, seed: int, prefix: str) -> Weights:
    """Random weights of these shapes, by key, such that signals keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation

    weights = {}
    for key, shape in shapes.items():
        if key.endswith(".scale") or (len(shape) == 1 and key.endswith(".weight")):  # of a normalisation
            value = 1 + normal(shape, 0.1)
        elif key.endswith("bias"):
            value = normal(shape, 0.1)
        else:
            value = normal(shape, _gain(key, shape) / math.sqrt(math.prod(shape[1:])))
        weights[prefix + key] = value.to(dtype)
    return weights


ROWS = (
    "_embedding.weight",
    "_embeddings.weight",
    "style_embedder.weight",
    "_embedding_padding",
    "positional_embedding",
)
"""Endings of the keys of tables."""


def _gain(key: str, shape: tuple[int, ...]) -> float:
    """What a layer's output is to be against its input. Modulation follows a SiLU of sums, hence more than 1."""
    if "_mod." in key or "modulation." in key or "adaLN" in key:
        return 1.5
    if key.endswith("scale_shift_table"):
        return math.sqrt(shape[1]) / 2  # added to what a linear layer gave
    if key == "pos_embed":
        return math.sqrt(math.prod(shape[1:]) / 2)  # as sines and cosines are
    if key.endswith(ROWS) or key == "shared.weight":
        return math.sqrt(shape[1])  # a row is an output by itself
    if key.endswith("SelfAttention.q.weight"):
        return 1 / 8  # T5 divides its scores by nothing
    return 1.0


def write(path: Where, weights: Weights) -> Path:
    """Writes a safetensors file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m xditd.models.making FOLDER")
    for written in make_models(sys.argv[1]):
        print(f"{written.stat().st_size / 2**20:8.1f} MiB  {written}")
