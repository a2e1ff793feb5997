"""Bytes of files brought onto a device by way of pinned slots: several threads read into them, and one sends them off, in order.

A thread reads where the interpreter is not needed, so that threads do read at once; a copy out of the page cache by one of them
is slower than what a GPU takes in. Knows no weights; what goes where is planned by `models.spans`.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from xditd.models.pinning import Pinned
from xditd.models.spans import Fill, Move, Run, fills
from xditd.protocol.errors import Code, XditError

SLOT = 8 << 20
"""Bytes of one slot: enough that what a copy costs by itself does not count."""

READERS = 8
"""Threads that read, at most; fewer where the process has fewer cores."""

SPARE = 2
"""Slots that are on their way while each reader has one."""

SWITCH = 0.0003
"""Seconds for which a thread that has read waits at most until it has the interpreter; Python's own 5 ms are as long as 20 reads."""


def readers() -> int:
    """How many threads read."""
    return min(READERS, len(os.sched_getaffinity(0)))


class Source(Protocol):
    """What has bytes. Any thread may read, and several at once."""

    def read(self, begin: int, into: torch.Tensor) -> None:
        """Fills `into`, uint8 on the CPU, with the bytes from `begin` on."""


class FileSource:
    """A file that is open."""

    def __init__(self, descriptor: int, name: str) -> None:
        """
        Args:
            name: what sentences call it.
        """
        self._descriptor = descriptor
        self._name = name

    def read(self, begin: int, into: torch.Tensor) -> None:
        memory = into.numpy().data
        while memory:
            count = os.preadv(self._descriptor, [memory], begin)
            if not count:
                raise XditError(
                    Code.FILE_INVALID,
                    f"{self._name} was cut short while it was read: {len(memory)} bytes are missing at {begin}; fetch it again.",
                )
            memory, begin = memory[count:], begin + count


class MadeSource:
    """A tensor that has to be computed from a file first. It is made when it is needed, and forgotten once all of it was read.

    Args:
        make: returns it, on the CPU.
        nbytes: of it.
        one_by_one: held while it is made: torch computes with all cores as it is.
    """

    def __init__(self, make: Callable[[], torch.Tensor], nbytes: int, one_by_one: Lock) -> None:
        self._make = make
        self._left = nbytes
        self._lock = one_by_one
        self._bytes: torch.Tensor | None = None

    def read(self, begin: int, into: torch.Tensor) -> None:
        with self._lock:
            if self._bytes is None:
                self._bytes = self._make().contiguous().view(-1).view(torch.uint8)
            made = self._bytes
        into.copy_(made[begin : begin + into.numel()])
        with self._lock:
            self._left -= into.numel()
            if not self._left:
                self._bytes = None


@dataclass(frozen=True, slots=True)
class Item:
    """What comes as a whole.

    Attributes:
        runs: of the sources, whose bytes one after another are its own.
        target: uint8, as long; on the device. Several may have the same, where each is used up as soon as it is there.
    """

    runs: Sequence[Run]
    target: torch.Tensor


class Slots(Protocol):
    """Staging memory, in slots of one size, and the way from there to a device.

    Attributes:
        memory: of each slot, uint8, on the CPU.
    """

    memory: Sequence[torch.Tensor]

    def send(self, slot: int, move: Move, target: torch.Tensor) -> None:
        """Has bytes of a slot go where `move` says in a target; they may still be on their way afterwards."""

    def sent(self, slot: int) -> None:
        """All of a slot has been sent."""

    def wait(self, slot: int) -> None:
        """Returns when all of a slot that was sent has arrived. Any thread may wait."""

    def close(self) -> None:
        """Returns when everything has arrived, and gives the memory back."""


class PinnedSlots:
    """Slots that a GPU takes from by itself. A `Slots`.

    What is sent is in order with what the thread that sends has the device compute.
    """

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self._device = device
        self._host = Pinned(count * nbytes, device)
        self.memory = self._host.memory.split(nbytes)
        # Threads wait for them by the dozen: they must not spin.
        self._arrived = [torch.cuda.Event(blocking=True) for _ in self.memory]

    def send(self, slot: int, move: Move, target: torch.Tensor) -> None:
        source = self.memory[slot][move.at : move.at + move.nbytes]
        target[move.begin : move.begin + move.nbytes].copy_(source, non_blocking=self._host.pinned)

    def sent(self, slot: int) -> None:
        self._arrived[slot].record(torch.cuda.current_stream(self._device))

    def wait(self, slot: int) -> None:
        self._arrived[slot].synchronize()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._host.let_go()


def bring(
    items: Sequence[Item],
    sources: Sequence[Source],
    slots: Slots,
    threads: int,
    arrived: Callable[[int], None],
) -> None:
    """Brings every item into its target, one after another.

    Args:
        items: in the order in which they are best read.
        sources: by the number that runs have for them.
        slots: through which they go.
        threads: that read.
        arrived: is told the number of each item whose bytes are all sent: what the device is asked from then on finds them there.

    Raises:
        XditError: `file_invalid` for a file that ends too early.
        OSError: a file cannot be read.
    """
    plan = fills([item.runs for item in items], slots.memory[0].numel())
    pool = ThreadPoolExecutor(threads, "xditd-read")
    under_way: deque[tuple[int, Fill, Future[None]]] = deque()

    def read(slot: int, fill: Fill) -> None:
        slots.wait(slot)
        memory = slots.memory[slot]
        for one in fill.reads:
            sources[one.source].read(one.begin, memory[one.at : one.at + one.nbytes])

    def begin(slot: int) -> None:
        fill = next(plan, None)
        if fill is not None:
            under_way.append((slot, fill, pool.submit(read, slot, fill)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        for slot in range(len(slots.memory)):
            begin(slot)
        while under_way:
            slot, fill, reading = under_way.popleft()
            reading.result()
            for move in fill.moves:
                slots.send(slot, move, items[move.item].target)
                if move.last:
                    arrived(move.item)
            slots.sent(slot)
            begin(slot)
    finally:
        pool.shutdown(cancel_futures=True)
        sys.setswitchinterval(before)
