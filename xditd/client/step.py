"""The tensors of one turn of a denoiser in shared memory. It knows slots and their descriptions, no sockets.

A `Parcel` serves every other request, and this one where tensors travel as frames. This is the way of every step, so
it does little before the request leaves: the rest is done while the ranks are at work.
"""

from __future__ import annotations

from collections.abc import Sequence

from xditd.client.buffers import Buffer, Source
from xditd.handoff.arena import Arena, Loan, Slot
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor


class Step:
    """What goes in, and room for as much to come out. For one thread, but for `release`."""

    __slots__ = ("_arena", "_given", "_loans", "_rooms", "_wanted")

    frames: tuple[bytearray, ...] = ()

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._given: list[Slot] = []
        self._rooms: list[Slot] = []
        self._wanted: list[Tensor] = []
        self._loans: list[Loan] = []

    def put(self, source: Source) -> tuple[Tensor, Tensor]:
        """Copies a tensor into a slot, and takes a slot for what becomes of it. Describes both.

        Raises:
            XditError: `arena_exhausted`.
        """
        given = self._arena.take(source.nbytes)
        self._given.append(given)
        given.kept = source.write(given.memory, given.kept)
        room = self._arena.take(source.nbytes)
        self._rooms.append(room)
        wanted = Tensor(dtype=source.dtype, shape=source.shape, segment=room.segment, offset=room.offset)
        self._wanted.append(wanted)
        return (
            Tensor(dtype=source.dtype, shape=source.shape, segment=given.segment, offset=given.offset),
            wanted,
        )

    def ahead(self) -> list[Buffer]:
        """The results, to be looked at once they are lent. To be called once."""
        self._loans = [self._arena.view(room) for room in self._rooms]
        return [
            Buffer(loan, wanted.dtype, wanted.shape)
            for loan, wanted in zip(self._loans, self._wanted, strict=True)
        ]

    def lend(self, outputs: Sequence[Tensor]) -> None:
        """Makes the results the caller's: a slot is given back when the last view of it is gone.

        Raises:
            XditError: `bad_slot` where the answer is not what was asked.
        """
        if list(outputs) != self._wanted:
            raise XditError(
                Code.BAD_SLOT, "The daemon answered with other slots, dtypes or shapes than were asked for."
            )
        for room, loan in zip(self._rooms, self._loans, strict=True):
            self._arena.lend_as(room, loan)
        self._rooms.clear()

    def release(self) -> None:
        """Gives back every slot that was not lent. Only when no rank can touch them any more."""
        for slot in self._given:
            self._arena.give(slot)
        for slot in self._rooms:
            self._arena.give(slot)
        self._given.clear()
        self._rooms.clear()
