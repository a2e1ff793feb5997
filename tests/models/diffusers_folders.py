"""Models as diffusers itself saves them, in shards, of the weights that a file in the makers' layout has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xditd.catalog.layouts import LAYOUTS
from xditd.models.making import flux_facts, make_flux, make_vae, vae_facts
from xditd.models.making_transformers import (
    hunyuandit_facts,
    make_hunyuandit,
    make_pixart,
    make_sd3,
    make_sdxl,
    pixart_facts,
    sd3_facts,
    sdxl_facts,
)  # fmt: skip
from xditd.models.reading import WeightFile

Facts = Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """One kind of model, small.

    Attributes:
        facts: of it.
        make: writes its makers' file.
        module: diffusers' class of it, by facts.
    """

    family: str
    facts: dict[str, int]
    make: Callable[[Path], Path]
    module: Callable[[Facts], Any]
    part: str = "transformer"


def _flux(facts: Facts) -> Any:
    from diffusers import FluxTransformer2DModel

    from xditd.models.flux.config import config

    return FluxTransformer2DModel(**config(facts))


def _sd3(facts: Facts) -> Any:
    from diffusers import SD3Transformer2DModel

    from xditd.models.sd3.config import config

    return SD3Transformer2DModel(**config(facts))


def _pixart(facts: Facts) -> Any:
    from diffusers import PixArtTransformer2DModel

    from xditd.models.pixart.config import config

    return PixArtTransformer2DModel(**config(facts))


def _hunyuandit(facts: Facts) -> Any:
    from diffusers import HunyuanDiT2DModel

    from xditd.models.hunyuandit.config import config

    return HunyuanDiT2DModel(**config(facts))


def _sdxl(facts: Facts) -> Any:
    from diffusers import UNet2DConditionModel

    from xditd.models.sdxl.config import config

    # As SDXL's own config.json has it, where ours takes the vector whole.
    real = config(facts) | {
        "class_embed_type": None,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    }
    return UNet2DConditionModel(**real)


def _vae(facts: Facts) -> Any:
    from diffusers import AutoencoderKL

    from xditd.models.vae.config import config

    return AutoencoderKL(**config(facts))


def _kind(family: str, facts: dict[str, int], make: Any, module: Any) -> Kind:
    return Kind(family, facts, lambda path: make(path, facts, dtype=torch.float32), module)


FLUX: dict[str, Any] = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}
VAE: dict[str, Any] = {"width": 32, "multiples": (1, 2), "blocks": 1}
HUNYUAN: dict[str, Any] = {
    "heads": 2, "ff": 64, "context_width": 64, "t5_width": 64, "pooled_width": 48, "text_tokens": 12, "t5_tokens": 14,
}  # fmt: skip

KINDS = {
    **{
        f"flux {variant}": Kind(
            "flux",
            flux_facts(**FLUX, guidance=guidance),
            lambda path, guidance=guidance: make_flux(path, **FLUX, guidance=guidance, dtype=torch.float32),
            _flux,
        )
        for variant, guidance in (("dev", True), ("schnell", False))
    },
    "sd3": _kind("sd3", sd3_facts(width=128, blocks=2, context_width=64, pooled_width=32), make_sd3, _sd3),
    "sd3.5 large": _kind(
        "sd3", sd3_facts(width=128, blocks=2, qk_norm=True, context_width=64, pooled_width=32), make_sd3, _sd3
    ),
    "sd3.5 medium": _kind(
        "sd3",
        sd3_facts(width=128, blocks=3, qk_norm=True, dual_blocks=2, context_width=64, pooled_width=32),
        make_sd3,
        _sd3,
    ),
    "pixart sigma": _kind("pixart", pixart_facts(context_width=64, text_tokens=0), make_pixart, _pixart),
    "pixart alpha": _kind(
        "pixart", pixart_facts(context_width=64, text_tokens=0, sizes=True), make_pixart, _pixart
    ),
    "hunyuandit 1.2": _kind("hunyuandit", hunyuandit_facts(**HUNYUAN), make_hunyuandit, _hunyuandit),
    "hunyuandit 1.1": _kind(
        "hunyuandit", hunyuandit_facts(**HUNYUAN, sizes=True), make_hunyuandit, _hunyuandit
    ),
    "sdxl": _kind("sdxl", sdxl_facts(context_width=64), make_sdxl, _sdxl),
    "vae of flux": Kind(
        "autoencoder_kl", vae_facts(**VAE), lambda path: make_vae(path, **VAE, dtype=torch.float32), _vae, "vae"
    ),
    "vae of sd": Kind(
        "autoencoder_kl",
        vae_facts(**VAE, latent_channels=4, quant=True),
        lambda path: make_vae(path, **VAE, latent_channels=4, quant=True, dtype=torch.float32),
        _vae,
        "vae",
    ),
}  # fmt: skip


def save(kind: Kind, makers: Path, folder: Path, shard: str = "10GB") -> Path:
    """Saves the weights of a makers' file as diffusers does: config.json, and shards of at most so many bytes."""
    file = WeightFile(makers)
    weights = {
        name: file.value(piece, torch.float32).contiguous()
        for name, piece in LAYOUTS[kind.family].pieces(kind.facts, "").items()
    }
    if kind.family == "sdxl":
        weights = {
            name.replace("class_embedding.", "add_embedding."): value for name, value in weights.items()
        }
    module = kind.module(kind.facts)
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    module.save_pretrained(folder, max_shard_size=shard)
    return folder


def pipeline(folder: Path, parts: Mapping[str, str], scheduler: Mapping[str, Any] | None = None) -> Path:
    """Writes what makes a folder of parts a pipeline.

    Args:
        parts: by folder, the class of what is in it.
        scheduler: its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {"_class_name": "Pipeline", "_diffusers_version": "0.30.0"}
    table |= {name: ["diffusers", kind] for name, kind in parts.items()} | {"safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(table))
    if scheduler is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
