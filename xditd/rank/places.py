"""Where an order's tensors lie: in a client's segment, or in a frame of the same message. Bytes only, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from xditd.handoff.passing import ReceivedSegments
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor


class Frame(Protocol):
    """A ZeroMQ frame, as far as it matters here."""

    @property
    def buffer(self) -> memoryview: ...


Frames = Sequence[Frame]
"""Those after the header."""


class Places:
    """The bytes that orders name, for rank 0.

    Args:
        arena_fd: the socket that segments' descriptors come by (`RankSpec.arena_fd`), or -1; taken over.
    """

    def __init__(self, arena_fd: int) -> None:
        self._segments = ReceivedSegments(arena_fd) if arena_fd >= 0 else None

    def bytes(self, tensor: Tensor, frames: Frames) -> memoryview:
        """The bytes of a tensor, not copied; writable where they lie in a segment.

        Raises:
            XditError: `bad_slot` where they are not there, and as `ReceivedSegments.get` does.
        """
        if tensor.segment is not None:
            if self._segments is None:
                raise XditError(
                    Code.BAD_SLOT, "A tensor lies in a segment, but this rank was given no arena."
                )
            return self._segments.get(tensor.segment).view(tensor.offset, tensor.nbytes)
        if tensor.frame is None or tensor.frame >= len(frames):
            raise XditError(Code.BAD_SLOT, f"Frame {tensor.frame} of a tensor did not come with its order.")
        return frames[tensor.frame].buffer

    def drop(self, segments: Iterable[int]) -> None:
        """Unmaps the segments of a client that is gone."""
        if self._segments is not None:
            self._segments.drop(segments)
