"""Random weights straight to a file: 24 GB in the time that the disk takes, made on the GPU where there is one.

`xditd.models.making` builds the whole model in memory first, which suits small models.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bench.step_overhead.size import Size
from xditd.catalog.families import flux

FORMAT = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(path: Path, size: Size, device: torch.device, seed: int = 0) -> None:
    """Writes the transformer of a size as a safetensors file in its makers' layout."""
    shapes = flux.parameters(size.facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        header = json.dumps(_header(shapes, size.dtype)).encode()
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for value in _values(shapes, size.dtype, device, seed):
            file.write(value.view(-1).view(torch.uint8).cpu().numpy().data)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, object]:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": FORMAT[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return table


def _values(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[torch.Tensor]:
    """Scaled so that signals keep a deviation near 1 on their way, and no step meets an infinity."""
    generator = torch.Generator(device).manual_seed(seed)
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator, device=device)
        if key.endswith(".scale"):
            value = 1 + 0.1 * value
        else:
            value *= 0.1 if key.endswith(".bias") else 1 / math.sqrt(math.prod(shape[1:]))
        yield value.to(dtype)
