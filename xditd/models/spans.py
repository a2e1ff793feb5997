"""Which bytes of a file are wanted, into which slot of staging memory each goes, and from there where. Pure: no file, no thread,
no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Rows = tuple[int, int]
"""Of a tensor's first dimension: from and up to."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that follow each other in a source, by its number."""

    source: int
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a source into a slot, from `at` on."""

    source: int
    begin: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of a slot into an item, by its number, from `begin` on.

    Attributes:
        last: the item is whole then.
    """

    item: int
    begin: int
    nbytes: int
    at: int
    last: bool


@dataclass(frozen=True, slots=True)
class Fill:
    """One filling of a slot: all reads are done before the first move."""

    reads: tuple[Read, ...]
    moves: tuple[Move, ...]


def fills(items: Sequence[Sequence[Run]], slot: int) -> Iterator[Fill]:
    """Items cut into fillings of slots, one item after another, each slot full but the last.

    Small items share a slot, and what follows each other in a source is one read of it, whoever's it is.

    Args:
        items: by number: the runs whose bytes one after another are the item's.
        slot: bytes of one.
    """
    reads: list[Read] = []
    moves: list[Move] = []
    full = 0
    for number, runs in enumerate(items):
        total, done = sum(run.nbytes for run in runs), 0
        if not total:
            moves.append(Move(number, 0, 0, full, last=True))
        for run in runs:
            begin, end = run.begin, run.begin + run.nbytes
            while begin < end:
                if full == slot:
                    yield Fill(tuple(reads), tuple(moves))
                    reads, moves, full = [], [], 0
                nbytes = min(end - begin, slot - full)
                _join(reads, Read(run.source, begin, nbytes, full))
                _append(moves, Move(number, done, nbytes, full, last=done + nbytes == total))
                begin, done, full = begin + nbytes, done + nbytes, full + nbytes
    if moves:
        yield Fill(tuple(reads), tuple(moves))


def _join(reads: list[Read], read: Read) -> None:
    before = reads[-1] if reads else None
    if before is not None and (before.source, before.begin + before.nbytes) == (read.source, read.begin):
        reads[-1] = replace(before, nbytes=before.nbytes + read.nbytes)
    else:
        reads.append(read)


def _append(moves: list[Move], move: Move) -> None:
    before = moves[-1] if moves else None
    if before is not None and before.item == move.item:
        moves[-1] = replace(before, nbytes=before.nbytes + move.nbytes, last=move.last)
    else:
        moves.append(move)


def rows_of(rows: Rows, swapped: bool, held: Sequence[Rows] | None) -> list[Rows]:
    """The rows of a tensor that are a parameter's, in the parameter's order.

    Args:
        rows: that it is made of.
        swapped: their halves change places.
        held: what of these is wanted, counted in the parameter; None: all.
    """
    first, last = rows
    half = last - (last - first) // 2
    order = [(half, last), (first, half)] if swapped else [rows]
    if held is None:
        return order
    return [part for begin, end in held for part in _within(order, begin, end)]


def _within(spans: Sequence[Rows], begin: int, end: int) -> Iterator[Rows]:
    for first, last in spans:
        lower, upper = max(first, first + begin), min(last, first + end)
        if lower < upper:
            yield lower, upper
        begin, end = begin - (last - first), end - (last - first)
