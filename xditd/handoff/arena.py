"""A client's arena: its lease, the segments of it, and the slots in them. For any thread. It knows no tensors."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from functools import lru_cache
from typing import Any

from xditd.handoff.lease import Lease
from xditd.handoff.segments import Segment
from xditd.handoff.slots import Slots
from xditd.protocol.errors import Code, XditError

Loan = ctypes.Array[ctypes.c_ubyte]
"""Bytes that are lent. Not a memoryview: a slice of a memoryview does not keep the memoryview that it is of."""


class Slot:
    """A piece of a segment that is the taker's until it is given back, or lent and the borrowers are gone.

    Attributes:
        segment, offset, nbytes: where it is, as a `Tensor` says it.
        memory: its bytes, writable.
        kept: whatever its taker made of the memory, to be found by the next taker of the same slot.
    """

    __slots__ = ("kept", "memory", "nbytes", "offset", "segment")

    def __init__(self, segment: int, offset: int, nbytes: int, memory: memoryview) -> None:
        self.segment = segment
        self.offset = offset
        self.nbytes = nbytes
        self.memory = memory
        self.kept: Any = None


class Arena:
    """Slots out of a lease's segments, growing by another segment where none fits.

    Args:
        lease: taken over: closing the arena ends it.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._slots = Slots()
        self._segments: dict[int, Segment] = {}
        self._lock = threading.Lock()
        # A finalizer runs in any thread and at any allocation, also while this thread holds the lock: what is given
        # back is queued here without one and sorted in by the next `take`.
        self._returned: deque[Slot] = deque()
        self._idle: dict[int, deque[Slot]] = {}  # by size: a step takes what the last one gave back, as it is
        self._add(*lease.first)

    def take(self, nbytes: int) -> Slot:
        """A slot of that many bytes.

        Raises:
            XditError: `arena_exhausted` where the daemon grants no more memory, `daemon_lost`.
        """
        with self._lock:
            while self._returned:
                slot = self._returned.popleft()
                self._idle.setdefault(slot.nbytes, deque()).append(slot)
            if idle := self._idle.get(nbytes):
                return idle.popleft()  # oldest first: x then has the same slot in every step
            place = self._slots.take(nbytes)
            if place is None and self._idle:
                self._join()
                place = self._slots.take(nbytes)
            if place is None:
                place = self._grow(nbytes)
            segment, offset = place
            return Slot(segment, offset, nbytes, self._segments[segment].view(offset, nbytes))

    def give(self, slot: Slot) -> None:
        """Takes a slot back. Once only, and not if it was lent."""
        self._returned.append(slot)

    def view(self, slot: Slot) -> Loan:
        """The slot's bytes, to be looked at once they are lent. Made ahead, while a rank is still to write them."""
        return _bytes(slot.nbytes).from_buffer(slot.memory)

    def lend(self, slot: Slot) -> memoryview:
        """The slot's bytes; the slot is given back when this view and every other that was made of it are gone."""
        loan = self.view(slot)
        self.lend_as(slot, loan)
        return memoryview(loan).cast("B")

    def lend_as(self, slot: Slot, loan: Loan) -> None:
        """Lends the slot as what `view` made of it."""
        loan.back, loan.slot = self._returned, slot  # type: ignore[attr-defined]

    @property
    def capacity(self) -> int:
        """Bytes of all segments."""
        return self._slots.capacity

    @property
    def in_use(self) -> int:
        """Bytes of the slots that somebody has."""
        with self._lock:
            self._join()
            return self._slots.in_use

    def close(self) -> None:
        """Ends the lease. Memory is unmapped when its last view is gone; slots can be given back, but not taken."""
        self.lease.close()
        with self._lock:
            for segment in self._segments.values():
                segment.close()

    def _add(self, segment_id: int, segment: Segment) -> None:
        self._segments[segment_id] = segment
        self._slots.add(segment_id, segment.nbytes)

    def _join(self) -> None:
        """Joins what was given back with what is free beside it."""
        for slots in self._idle.values():
            self._returned.extend(slots)
        self._idle.clear()
        while self._returned:
            slot = self._returned.popleft()
            self._slots.give(slot.segment, slot.offset)

    def _grow(self, nbytes: int) -> tuple[int, int]:
        try:
            self._add(*self.lease.grow(max(nbytes, 1)))
        except XditError as error:
            if error.code != Code.ARENA_EXHAUSTED:
                raise
            raise XditError(
                Code.ARENA_EXHAUSTED,
                f"No {nbytes} bytes of shared memory are free: {self._slots.in_use} of {self._slots.capacity} are in "
                f"use by tensors that this program still holds. {error.message} Let go of results, or clone them.",
                asked=nbytes,
                in_use=self._slots.in_use,
                capacity=self._slots.capacity,
            ) from error
        place = self._slots.take(nbytes)
        if place is None:
            raise XditError(Code.BAD_MESSAGE, f"The daemon granted a segment smaller than {nbytes} bytes.")
        return place


@lru_cache(maxsize=256)
def _bytes(nbytes: int) -> type[Loan]:
    """A kind of array that gives its slot back when it goes, if it was lent: in a fifth of weakref.finalize's time."""

    def go(loan: Loan) -> None:
        if loan.slot is not None:  # type: ignore[attr-defined]
            loan.back.append(loan.slot)  # type: ignore[attr-defined]

    fields = {"_type_": ctypes.c_ubyte, "_length_": nbytes, "back": None, "slot": None, "__del__": go}
    return type("Loan", (ctypes.Array,), fields)
