"""A network's weights, given up while nobody needs them and brought back to the last bit. Knows no family and no rank.

On a GPU they wait in the host's memory, pinned where the driver does that, as they are: with LoRAs, if some are merged. On
a CPU there is nothing to move: pages of the file go back to the page cache, and copies that were made of it (another dtype,
halves that change places) are dropped and made anew, so that LoRAs have to be taken out first.

A parameter keeps its place in its module throughout: only the memory behind it goes and comes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch

from xditd.models.reading import Placed, WeightFile

ALIGNMENT = 256
"""Bytes to which each piece begins in the host's memory."""


class Place(Protocol):
    """Where weights are, and so how they go to sleep."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Weights:
    """All weights that were read from a file.

    Attributes:
        asleep: they are given up; nothing may be computed until they are back.
    """

    def __init__(self, file: WeightFile, device: torch.device) -> None:
        self.asleep = False
        self._place: Place = _OnGpu(file, device) if device.type == "cuda" else _OnCpu(file)

    def sleep(self) -> None:
        """Gives their memory back. Nothing may be under way on the device."""
        if not self.asleep:
            self._place.sleep()
            self.asleep = True

    def wake(self) -> None:
        """Brings them back.

        Raises:
            torch.OutOfMemoryError: the device has no room for them. They are lost then to this process.
        """
        if self.asleep:
            self._place.wake()
            self.asleep = False


class _OnCpu:
    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._dropped: list[Placed] = []

    def sleep(self) -> None:
        for placed in self._file.placed.values():
            if not self._file.has(placed.parameter):
                placed.parameter.untyped_storage().resize_(0)
                self._dropped.append(placed)
        self._file.let_go()
        # What was freed lies in the allocator's lists, and is the process's until it is told.
        ctypes.CDLL(None).malloc_trim(0)

    def wake(self) -> None:
        for placed in self._dropped:
            dtype = placed.parameter.dtype
            placed.parameter.data = self._file.value(placed.piece, dtype, cut=placed.cut)
        self._dropped.clear()


class _OnGpu:
    def __init__(self, file: WeightFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._host: torch.Tensor | None = None
        self._pinned = False
        self._gone: list[tuple[torch.UntypedStorage, int, int]] = []  # with where in `_host`, and its bytes

    def sleep(self) -> None:
        end = 0
        for storage in self._storages():
            self._gone.append((storage, end, storage.nbytes()))
            end += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        self._host = host = torch.empty(end, dtype=torch.uint8)
        # Not torch's own pinned memory, which comes in powers of two and is kept for ever.
        self._pinned = int(_cudart().cudaHostRegister(host.data_ptr(), end, 0)) == 0
        if not self._pinned:
            _take_error(self._device)
        for storage, begin, nbytes in self._gone:
            host[begin : begin + nbytes].copy_(self._bytes_of(storage), non_blocking=self._pinned)
        torch.cuda.synchronize(self._device)
        for storage, _, _ in self._gone:
            storage.resize_(0)
        torch.cuda.empty_cache()

    def wake(self) -> None:
        host = self._host
        assert host is not None
        for storage, begin, nbytes in self._gone:
            storage.resize_(nbytes)
            self._bytes_of(storage).copy_(host[begin : begin + nbytes], non_blocking=self._pinned)
        torch.cuda.synchronize(self._device)
        if self._pinned:
            _cudart().cudaHostUnregister(host.data_ptr())
        self._host, self._pinned = None, False
        self._gone.clear()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Of all parameters, each once."""
        seen: set[int] = set()
        for placed in self._file.placed.values():
            storage = placed.parameter.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _take_error(device: torch.device) -> None:
    """Spends the error of a call of CUDA that did no harm. The runtime keeps it, and the next kernel's launch would raise it."""
    with suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)


def _cudart() -> Any:
    return torch.cuda.cudart()
