"""How long a model takes onto its device, beside a plain copy of its file's bytes there through pinned memory.

    python -m bench.loading              # a file of FLUX.1-dev's size (24 GB of disk), warm in the page cache, onto cuda:0
    python -m bench.loading --small      # tries the script on a CPU; its figures mean nothing

In every round, in turn: the plain copy, out of the mapped file through two pinned buffers; and the loader as a rank calls it:
header, network on the meta device, every parameter in its place. Both begin with no memory pinned and none of the device held, as
a rank does that has just started. The ratio is of the two in the same round.

Besides, to tell where the loader's time goes: the same without a byte sent to the device (read), and without one read (sent).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from bench.spread import ratios, spread
from xditd.catalog.families import flux
from xditd.models import families, uploading
from xditd.models.making import flux_facts
from xditd.models.spans import Move
from xditd.models.staging import FileSource, PinnedSlots

REAL = {"heads": 24, "double_blocks": 19, "single_blocks": 38}
SMALL = {"heads": 2, "double_blocks": 2, "single_blocks": 2}

BUFFER = 64 << 20
"""Bytes of one buffer of the plain copy."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a small model on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the file; default: a temporary one")
    chosen = parser.parse_args()
    device = torch.device("cpu" if chosen.small else "cuda:0")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        path = make(Path(folder) / "flux.safetensors", SMALL if chosen.small else REAL)
        print(json.dumps(measure(path, device, chosen.rounds), indent=1))


def make(path: Path, sizes: dict[str, int]) -> Path:
    """A Flux in bfloat16 of random numbers, the same ones again every 64 MiB."""
    table: dict[str, object] = {}
    end = 0
    for key, shape in flux.parameters(flux_facts(**sizes)).items():
        begin, end = end, end + 2 * math.prod(shape)
        table[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    block = torch.randn(BUFFER // 2).bfloat16().view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, end, len(block)):
            file.write(block[: end - begin])
    return path


def measure(path: Path, device: torch.device, rounds: int) -> dict[str, object]:
    """Seconds of each way, and the ratio of the loader and the plain copy."""

    def load() -> object:
        return families.load("flux", path, "transformer", device, torch.bfloat16)

    def read() -> object:
        with mock.patch.dict(uploading.STAGED, {"cuda": Unsent}):
            return load()

    def sent() -> object:
        with mock.patch.object(FileSource, "read", return_value=None):
            return load()

    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(path, device),
        "load": load,
        "read": read,
        "sent": sent,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms the page cache, imports and the allocators
        for name, way in ways.items():
            settle(device)
            began = time.perf_counter()
            held = way()
            wait(device)
            if number:
                times[name].append(time.perf_counter() - began)
            del held
    ratio = ratios(times["load"], times["copy"])
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "gib": round(path.stat().st_size / 2**30, 3),
        "copy seconds": spread(times["copy"]).text(),
        "load seconds": spread(times["load"]).text(),
        "read seconds": spread(times["read"]).text(),
        "sent seconds": spread(times["sent"]).text(),
        "load / copy": ratio.text(),
        "rounds": rounds,
    }


class Unsent(PinnedSlots):
    """Slots of which nothing goes to the device."""

    def send(self, slot: int, move: Move, target: torch.Tensor) -> None:
        pass


def copy(path: Path, device: torch.device) -> torch.Tensor:
    """A file's bytes on the device, through two pinned buffers: one is filled while the other is on its way."""
    size = os.path.getsize(path)
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    source = torch.empty(0, dtype=torch.uint8).set_(storage)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        return target.copy_(source)
    buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    sent = [torch.cuda.Event(), torch.cuda.Event()]
    for number, begin in enumerate(range(0, size, BUFFER)):
        chunk = source[begin : begin + BUFFER]
        buffer, event = buffers[number % 2][: chunk.numel()], sent[number % 2]
        event.synchronize()
        buffer.copy_(chunk)
        target[begin : begin + BUFFER].copy_(buffer, non_blocking=True)
        event.record()
    return target


def settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
