"""Slots never overlap, stay inside their segments, and all come back."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xditd.handoff.slots import Slots
from xditd.protocol.tensors import ALIGNMENT


class Allocations(RuleBasedStateMachine):
    """Any sequence of segments, takes and returns."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots()
        self.segments: dict[int, int] = {}
        self.taken: dict[tuple[int, int], int] = {}

    @rule(nbytes=st.integers(1, 4096))
    def a_segment_is_added(self, nbytes: int) -> None:
        segment = len(self.segments)
        self.segments[segment] = nbytes
        self.slots.add(segment, nbytes)

    @rule(nbytes=st.integers(0, 2048))
    def a_slot_is_taken(self, nbytes: int) -> None:
        place = self.slots.take(nbytes)
        if place is None:
            assert self.largest_gap() < max(1, nbytes), "there was room"
        else:
            assert place not in self.taken
            self.taken[place] = nbytes

    @rule(data=st.data())
    def a_slot_is_given_back(self, data) -> None:
        if self.taken:
            place = data.draw(st.sampled_from(sorted(self.taken)))
            del self.taken[place]
            self.slots.give(*place)

    @invariant()
    def none_overlap_and_all_are_inside_and_aligned(self) -> None:
        end: dict[int, int] = {}
        for (segment, offset), nbytes in sorted(self.taken.items()):
            assert offset % ALIGNMENT == 0
            assert offset >= end.get(segment, 0)
            end[segment] = offset + nbytes
            assert end[segment] <= self.segments[segment]

    @invariant()
    def what_is_in_use_is_what_was_taken(self) -> None:
        rounded = sum(max(1, -(-n // ALIGNMENT)) * ALIGNMENT for n in self.taken.values())
        assert self.slots.in_use == rounded

    def largest_gap(self) -> int:
        """Bytes of the largest aligned gap, found the slow way."""
        largest = 0
        for segment, size in self.segments.items():
            edges = sorted(
                (o, o + max(1, -(-n // ALIGNMENT)) * ALIGNMENT)
                for (s, o), n in self.taken.items()
                if s == segment
            )
            at = 0
            for begin, end in [*edges, (size // ALIGNMENT * ALIGNMENT, 0)]:
                largest = max(largest, begin - at)
                at = end
        return largest

    def teardown(self) -> None:
        for place in list(self.taken):
            self.slots.give(*place)
        assert self.slots.in_use == 0
        for size in self.segments.values():  # joined again: each segment can be had whole
            usable = size // ALIGNMENT * ALIGNMENT
            if usable:
                assert self.slots.take(usable) is not None


TestAllocations = Allocations.TestCase


def test_a_slot_is_not_returned_twice() -> None:
    slots = Slots()
    slots.add(1, 1024)
    place = slots.take(10)
    assert place is not None
    slots.give(*place)
    with pytest.raises(KeyError):
        slots.give(*place)


def test_the_smallest_gap_that_fits_is_used() -> None:
    slots = Slots()
    slots.add(1, 1024)
    slots.add(2, 128)
    assert slots.take(128) == (2, 0)
    assert slots.take(128) == (1, 0)
