"""How a tensor is described in a message, and whether the description can be true.

The bytes are never in the description: they lie in a shared segment (`segment`, `offset`) or in a ZeroMQ
frame of the same message (`frame`). Everything here is checked before anybody maps or reads them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

from msgspec import Meta, Struct

from xditd.protocol.errors import Code, XditError

ITEMSIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}
"""The dtypes that travel, by torch's names, with bytes per element."""

FLOATS = ("float32", "float16", "bfloat16")
"""The dtypes of latents, conditioning and images."""

ALIGNMENT = 64
"""Every slot begins at a multiple of this many bytes: any dtype may be viewed in place."""

Dimension = Annotated[int, Meta(ge=1, le=2**31)]
Index = Annotated[int, Meta(ge=0, le=2**53)]


class Tensor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A contiguous tensor, row-major, native byte order.

    Exactly one of (`segment`, `offset`) and `frame` says where its bytes are.
    """

    dtype: str
    shape: tuple[Dimension, ...]
    segment: Index | None = None  # id of a segment of the sender's arena
    offset: Index = 0  # bytes from the segment's beginning
    frame: Annotated[int, Meta(ge=0, le=255)] | None = None  # index among the frames after the header

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


@lru_cache(maxsize=1024)  # a step asks a dozen times, and every step the same
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEMSIZE[dtype]


def check(tensor: Tensor, what: str, *, segments: dict[int, int], frames: list[int]) -> None:
    """Refuses a description that cannot be true.

    Args:
        tensor: the description.
        what: what it is to its sender ("x of item 0"), for the sentence.
        segments: size in bytes of each segment that the sender may name.
        frames: size in bytes of each frame of the same message.

    Raises:
        XditError: `bad_tensor` for a dtype or length that cannot be, `bad_slot` for bytes that are not there.
    """
    if tensor.dtype not in ITEMSIZE:
        raise XditError(
            Code.BAD_TENSOR,
            f"{what} has dtype {tensor.dtype!r}; the dtypes that travel are {', '.join(ITEMSIZE)}.",
        )
    if len(tensor.shape) > 8:
        raise XditError(Code.BAD_TENSOR, f"{what} has {len(tensor.shape)} dimensions; at most 8 travel.")
    if (tensor.segment is None) == (tensor.frame is None):
        raise XditError(Code.BAD_SLOT, f"{what} must name either a segment or a frame, and not both.")
    if tensor.frame is not None:
        if tensor.frame >= len(frames):
            raise XditError(
                Code.BAD_SLOT, f"{what} names frame {tensor.frame}, but the message has {len(frames)}."
            )
        if frames[tensor.frame] != tensor.nbytes:
            raise XditError(
                Code.BAD_TENSOR,
                f"{what} needs {tensor.nbytes} bytes for {tensor.dtype} {list(tensor.shape)}, "
                f"but its frame has {frames[tensor.frame]}.",
            )
        return
    assert tensor.segment is not None
    size = segments.get(tensor.segment)
    if size is None:
        raise XditError(Code.BAD_SLOT, f"{what} names a segment that this connection does not hold.")
    if tensor.offset % ALIGNMENT:
        raise XditError(
            Code.BAD_SLOT, f"{what} begins at byte {tensor.offset}, not at a multiple of {ALIGNMENT}."
        )
    if tensor.offset + tensor.nbytes > size:
        raise XditError(Code.BAD_SLOT, f"{what} reaches beyond the end of its segment.")


def check_apart(outputs: list[tuple[str, Tensor]], inputs: list[tuple[str, Tensor]]) -> None:
    """Refuses an output that shares bytes with another output or with an input of the same request.

    Raises:
        XditError: `bad_slot`.
    """
    spans = [(t.segment, t.offset, t.offset + t.nbytes, what) for what, t in inputs if t.segment is not None]
    for what, tensor in outputs:
        if tensor.segment is None:
            continue
        begin, end = tensor.offset, tensor.offset + tensor.nbytes
        for segment, other_begin, other_end, other in spans:
            if segment == tensor.segment and begin < other_end and other_begin < end:
                raise XditError(
                    Code.BAD_SLOT, f"{what} overlaps {other}; each output needs a slot of its own."
                )
        spans.append((tensor.segment, begin, end, what))
