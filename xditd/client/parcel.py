"""A parcel: the tensors of one request on their way out and back. It knows slots and frames, no sockets.

With an arena they lie in slots, without one they are frames of the messages; nobody else has to know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xditd.client.buffers import Buffer, Source
from xditd.handoff.arena import Arena, Slot
from xditd.protocol import tensors
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import ITEMSIZE, Tensor


class Parcel:
    """The slots and frames of one request. For one thread, but for `release`.

    Slots are held until `release`, because a rank may read or write them until the request is answered; what `open`
    returned holds its own slot from then on.

    Attributes:
        frames: to be sent after the header.
    """

    __slots__ = ("_arena", "_frame_bytes", "_held", "frames")

    def __init__(self, arena: Arena | None, frame_bytes: int) -> None:
        """
        Args:
            frame_bytes: the most that the daemon takes in one frame.
        """
        self._arena = arena
        self._frame_bytes = frame_bytes
        self._held: dict[tuple[int, int], tuple[Slot, Tensor]] = {}
        self.frames: list[bytearray] = []

    def put(self, source: Source) -> Tensor:
        """Copies a tensor into the parcel and describes it.

        Raises:
            XditError: `arena_exhausted`, `too_large` for a frame.
        """
        if self._arena is None:
            if source.nbytes > self._frame_bytes:
                raise XditError(
                    Code.TOO_LARGE,
                    f"A tensor of {source.nbytes} bytes is over the daemon's limit of {self._frame_bytes} for a frame; "
                    "use shared memory, or send it in parts.",
                )
            frame = bytearray(source.nbytes)
            source.write(memoryview(frame), None)
            self.frames.append(frame)
            return Tensor(dtype=source.dtype, shape=source.shape, frame=len(self.frames) - 1)
        slot, tensor = self._take(self._arena, source.dtype, source.shape, source.nbytes)
        slot.kept = source.write(slot.memory, slot.kept)
        return tensor

    def room(self, dtype: str, shape: tuple[int, ...], nbytes: int) -> Tensor | None:
        """A slot for an output; None where it will come as a frame."""
        return None if self._arena is None else self._take(self._arena, dtype, shape, nbytes)[1]

    def floats(self, shape: tuple[int, ...]) -> Tensor | None:
        """A slot for a float32 output of that shape; None where it will come as a frame."""
        return self.room("float32", shape, nbytes_of("float32", shape))

    def open(self, tensor: Tensor, wanted: Tensor | None, frames: Sequence[Any]) -> Buffer:
        """An output: a view of its slot, which is given back when the last view of it is gone, or its frame.

        Args:
            tensor: as the answer describes it.
            wanted: what `room` gave.
            frames: of the answer.

        Raises:
            XditError: `bad_tensor`, `bad_slot` where the answer is not what was asked.
        """
        if wanted is None:
            tensors.check(tensor, "an output", segments={}, frames=[len(frame) for frame in frames])
            assert tensor.frame is not None
            return Buffer(_writable(frames[tensor.frame]), tensor.dtype, tensor.shape)
        if tensor != wanted or self._arena is None:
            raise XditError(
                Code.BAD_SLOT, "The daemon answered with another slot, dtype or shape than was asked for."
            )
        assert tensor.segment is not None
        slot, _ = self._held.pop((tensor.segment, tensor.offset))
        return Buffer(self._arena.lend(slot), tensor.dtype, tensor.shape)

    def copy(self, tensor: Tensor, frames: Sequence[Any]) -> Buffer:
        """A copy of an output whose slot stays in the parcel, because it will be written to again.

        Raises:
            XditError: `bad_tensor`, `bad_slot` where it is none of this parcel's.
        """
        if tensor.frame is not None:
            return self.open(tensor, None, frames)
        held = self._held.get((tensor.segment, tensor.offset)) if tensor.segment is not None else None
        if held is None or held[1] != tensor:
            raise XditError(Code.BAD_SLOT, "The daemon names a slot that was not given to it.")
        return Buffer(bytearray(held[0].memory), tensor.dtype, tensor.shape)

    def release(self) -> None:
        """Gives back every slot that was not opened. Only when no rank can touch them any more."""
        if self._arena is not None:
            for slot, _ in self._held.values():
                self._arena.give(slot)
        self._held.clear()
        self.frames.clear()

    def _take(self, arena: Arena, dtype: str, shape: tuple[int, ...], nbytes: int) -> tuple[Slot, Tensor]:
        slot = arena.take(nbytes)
        tensor = Tensor(dtype=dtype, shape=shape, segment=slot.segment, offset=slot.offset)
        self._held[slot.segment, slot.offset] = (slot, tensor)
        return slot, tensor


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    total = ITEMSIZE[dtype]
    for size in shape:
        total *= size
    return total


def _writable(frame: Any) -> Any:
    """A frame's memory, copied where it can not be used in place: results are written to by their owners."""
    memory = memoryview(frame)
    return bytearray(memory) if memory.readonly or len(memory) < _SMALL else memory


_SMALL = 64 * 1024
"""Below it ZeroMQ places a frame anywhere in a shared buffer, unaligned; larger ones have an allocation of their own."""
