"""Safetensors files with real headers and no data: written by hand, and sparse, so that 24 GB cost a few KB of disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xditd.catalog.families import autoencoder_kl, flux
from xditd.catalog.header import BITS, Header, TensorEntry

Shapes = Mapping[str, tuple[int, ...]]

FLUX_DEV = {
    "width": 3072,
    "heads": 24,
    "head_dim": 128,
    "double_blocks": 19,
    "single_blocks": 38,
    "context_width": 4096,
    "pooled_width": 768,
    "latent_channels": 16,
    "guidance": 1,
    "scale": 8,
}
FLUX_SCHNELL = FLUX_DEV | {"guidance": 0}
SMALL_FLUX = FLUX_DEV | {
    "width": 256,
    "heads": 2,
    "double_blocks": 2,
    "single_blocks": 3,
    "context_width": 64,
}

FLUX_VAE = {
    "latent_channels": 16,
    "scale": 8,
    "channels": 128,
    "levels": 4,
    "blocks": 2,
    "quant": 0,
    "channels_0": 128,
    "channels_1": 256,
    "channels_2": 512,
    "channels_3": 512,
}
SDXL_VAE = FLUX_VAE | {"latent_channels": 4, "quant": 1}


def entries(shapes: Shapes, dtype: str = "BF16", begin: int = 0) -> dict[str, dict[str, Any]]:
    """A header's entries, one after the other from byte `begin`."""
    table = {}
    for key, shape in shapes.items():
        end = begin + math.prod(shape) * BITS[dtype] // 8
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return table


def write(path: Path, table: Mapping[str, Any], *, missing: int = 0) -> Path:
    """A file with these entries, its data a hole; `missing` bytes are cut from its end."""
    text = json.dumps(table).encode()
    size = max((e["data_offsets"][1] for k, e in table.items() if k != "__metadata__"), default=0)
    return write_text(path, text, data=size - missing)


def write_text(path: Path, text: bytes, *, data: int = 0, length: int | None = None) -> Path:
    """A file with this header, true or not; `length` is what its first 8 bytes say, by default the truth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    return path


def prefixed(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {prefix + key: shape for key, shape in shapes.items()}


def write_flux(
    path: Path, facts: Mapping[str, int] = SMALL_FLUX, prefix: str = "", dtype: str = "BF16"
) -> Path:
    return write(path, entries(prefixed(prefix, flux.parameters(facts)), dtype))


def write_vae(path: Path, facts: Mapping[str, int] = FLUX_VAE, prefix: str = "", dtype: str = "F32") -> Path:
    return write(path, entries(prefixed(prefix, autoencoder_kl.parameters(facts)), dtype))


def header_of(shapes: Shapes, dtype: str = "BF16", name: str = "model.safetensors") -> Header:
    """A header without a file."""
    tensors = {
        key: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for key, entry in entries(shapes, dtype).items()
    }
    end = max((entry.end for entry in tensors.values()), default=0)
    return Header(tensors=tensors, metadata={}, data_offset=8, bytes=8 + end, name=name)
