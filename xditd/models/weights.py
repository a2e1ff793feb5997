"""A network's weights, given up while nobody needs them and brought back to the last bit. Knows no family and no rank.

On a GPU they wait in the host's memory, pinned where the driver does that, as they are: with LoRAs, if some are merged. On
a CPU there is nothing to move: pages of the file go back to the page cache, and copies that were made of it (another dtype,
halves that change places) are dropped and made anew, so that LoRAs have to be taken out first.

A parameter keeps its place in its module throughout: only the memory behind it goes and comes. What `offload` has away between
turns sleeps where it waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from xditd.models.offload import Offload
from xditd.models.pinning import ALIGNMENT, Pinned
from xditd.models.reading import Placed, WeightFile, held
from xditd.models.storage import Storage


class Place(Protocol):
    """Where weights are, and so how they go to sleep."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Weights:
    """All weights that were read from a file.

    Attributes:
        asleep: they are given up; nothing may be computed until they are back.
        offload: what of them comes and goes; None: nothing does.
        storage: what of them is cast as it runs; None: nothing is.
    """

    def __init__(
        self,
        file: WeightFile,
        device: torch.device,
        offload: Offload | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.asleep = False
        self.offload = offload
        self.storage = storage
        self._place: Place = _OnGpu(file, device) if device.type == "cuda" else _OnCpu(file)

    def counted(self, network: nn.Module) -> tuple[int, int]:
        """Bytes of a network's parameters and buffers that are on the device in a turn, and that wait in the host's memory."""
        cast = 0 if self.storage is None else self.storage.coming
        if self.offload is None:
            return held(network) + cast, 0
        return held(network) + cast + self.offload.coming, self.offload.waiting

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
        self._dropped: list[tuple[Placed, int]] = []  # with the bytes of what was behind it

    def sleep(self) -> None:
        for placed in self._file.placed.values():
            if not placed.away and not self._file.has(placed.memory):
                storage = placed.memory.untyped_storage()
                self._dropped.append((placed, storage.nbytes()))
                storage.resize_(0)
        self._file.let_go()
        # What was freed lies in the allocator's lists, and is the process's until it is told.
        ctypes.CDLL(None).malloc_trim(0)

    def wake(self) -> None:
        for placed, nbytes in self._dropped:
            value = self._file.value(placed.piece, placed.parameter.dtype, cut=placed.cut)
            if placed.home is None:
                placed.parameter.data = value
            else:
                placed.memory.untyped_storage().resize_(nbytes)
                placed.home.put(value, own=False)
        self._dropped.clear()


class _OnGpu:
    def __init__(self, file: WeightFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._host: Pinned | None = None
        self._gone: list[tuple[torch.UntypedStorage, int, int]] = []  # with where in `_host`, and its bytes

    def sleep(self) -> None:
        end = 0
        for storage in self._storages():
            self._gone.append((storage, end, storage.nbytes()))
            end += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        self._host = host = Pinned(end, self._device)
        for storage, begin, nbytes in self._gone:
            host.memory[begin : begin + nbytes].copy_(self._bytes_of(storage), non_blocking=host.pinned)
        torch.cuda.synchronize(self._device)
        for storage, _, _ in self._gone:
            storage.resize_(0)
        torch.cuda.empty_cache()

    def wake(self) -> None:
        host = self._host
        assert host is not None
        for storage, begin, nbytes in self._gone:
            storage.resize_(nbytes)
            self._bytes_of(storage).copy_(host.memory[begin : begin + nbytes], non_blocking=host.pinned)
        torch.cuda.synchronize(self._device)
        host.let_go()
        self._host = None
        self._gone.clear()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Of all parameters that stay on the device, each once."""
        seen: set[int] = set()
        for placed in self._file.placed.values():
            storage = placed.memory.untyped_storage()
            if not placed.away and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
