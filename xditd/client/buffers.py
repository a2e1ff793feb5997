"""A tensor without torch: bytes, a dtype and a shape. It knows no slots and no messages."""

from __future__ import annotations

import math
from typing import Any, Protocol

from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import ITEMSIZE


class Source(Protocol):
    """What can be sent: it is described, and it writes itself into the memory that it is given."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def write(self, memory: memoryview, kept: Any) -> Any:
        """Fills `memory`, `nbytes` long, row-major: the one copy on the way out.

        Args:
            kept: what the last write to the same memory returned, or None.

        Returns:
            What the next write to it may use.
        """


class Buffer:
    """Contiguous bytes with a dtype and a shape. Every method of `Run` that takes tensors takes Buffers as well, and
    answers Buffers with Buffers.

    Args:
        memory: any object with a contiguous buffer; kept, not copied.
        dtype: "float32", "bfloat16", ... as they travel.
        shape: of any length up to 8.

    Raises:
        XditError: `bad_tensor` where dtype, shape and length do not fit.
    """

    __slots__ = ("dtype", "memory", "nbytes", "shape")

    def __init__(self, memory: Any, dtype: str, shape: tuple[int, ...]) -> None:
        self.memory = memoryview(memory).cast("B")
        self.dtype = dtype
        self.shape = shape
        self.nbytes = len(self.memory)
        if dtype not in ITEMSIZE or math.prod(shape) * ITEMSIZE[dtype] != self.nbytes:
            raise XditError(
                Code.BAD_TENSOR, f"{self.nbytes} bytes are no {dtype} tensor of shape {list(shape)}."
            )

    def write(self, memory: memoryview, kept: Any) -> None:
        memory[:] = self.memory
