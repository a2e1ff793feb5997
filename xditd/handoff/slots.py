"""Slots: who has which bytes of some segments. Arithmetic alone: it knows no memory, threads or processes."""

from __future__ import annotations

from bisect import bisect_left

from xditd.protocol.tensors import ALIGNMENT


class Slots:
    """An allocator of aligned pieces over any number of segments: best fit, neighbours joined on return."""

    def __init__(self) -> None:
        # Segment: (offset, bytes), by offset, never adjacent.
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._taken: dict[tuple[int, int], int] = {}  # (segment, offset): bytes
        self.capacity = 0
        self.in_use = 0

    def add(self, segment: int, nbytes: int) -> None:
        """A further segment, all free. What is over the last multiple of the alignment is never given."""
        if segment in self._free:
            raise ValueError(f"segment {segment} is already here")
        usable = nbytes // ALIGNMENT * ALIGNMENT
        self._free[segment] = [(0, usable)] if usable else []
        self.capacity += usable

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """(segment, offset) of at least `nbytes` that nobody has, or None where no free piece is large enough."""
        need = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        best: tuple[int, int, int] | None = None  # bytes, segment, index
        for segment, pieces in self._free.items():
            for index, (_, size) in enumerate(pieces):
                if size >= need and (best is None or size < best[0]):
                    best = (size, segment, index)
        if best is None:
            return None
        size, segment, index = best
        pieces = self._free[segment]
        offset = pieces[index][0]
        if size == need:
            del pieces[index]
        else:
            pieces[index] = (offset + need, size - need)
        self._taken[segment, offset] = need
        self.in_use += need
        return segment, offset

    def give(self, segment: int, offset: int) -> None:
        """Returns what `take` gave. Raises KeyError for what nobody has: a slot must not be returned twice."""
        size = self._taken.pop((segment, offset))
        self.in_use -= size
        pieces = self._free[segment]
        index = bisect_left(pieces, (offset, 0))
        if index < len(pieces) and pieces[index][0] == offset + size:
            size += pieces.pop(index)[1]
        if index and sum(pieces[index - 1]) == offset:
            index -= 1
            offset, before = pieces.pop(index)
            size += before
        pieces.insert(index, (offset, size))
