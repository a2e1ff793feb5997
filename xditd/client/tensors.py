"""Torch tensors to bytes and back. The client's one import of torch, made when the first tensor comes."""

from __future__ import annotations

import ctypes

import torch

from xditd.client.buffers import Buffer
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import ITEMSIZE

_BY_NAME: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEMSIZE}
_BY_DTYPE = {dtype: name for name, dtype in _BY_NAME.items()}


class TensorSource:
    """A tensor to be sent: of any strides, on any device.

    Raises:
        XditError: `bad_tensor` for what is no tensor, is empty, or has a dtype that does not travel.
    """

    __slots__ = ("dtype", "nbytes", "shape", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise XditError(Code.BAD_TENSOR, f"A {type(tensor).__name__} is no torch tensor.")
        name = _BY_DTYPE.get(tensor.dtype)
        if name is None:
            raise XditError(
                Code.BAD_TENSOR,
                f"A tensor of {tensor.dtype} does not travel; convert it to one of {', '.join(ITEMSIZE)}.",
            )
        self.dtype = name
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.numel() * ITEMSIZE[name]
        if not self.nbytes:
            raise XditError(Code.BAD_TENSOR, f"A tensor of shape {list(self.shape)} is empty.")
        self.tensor = tensor

    def write(self, memory: memoryview, kept: int | None) -> int | None:
        tensor = self.tensor
        if not (tensor.is_contiguous() and tensor.is_cpu) or tensor.is_neg():
            torch.frombuffer(memory, dtype=tensor.dtype).view(self.shape).copy_(tensor.detach())
            return kept
        # By this thread alone: torch would wake its whole pool, which after the pause of a step costs milliseconds; and
        # past torch's dispatcher, whose code would have to come from memory first.
        address = kept or ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        ctypes.memmove(address, tensor.data_ptr(), self.nbytes)
        return address


def read(buffer: Buffer) -> torch.Tensor:
    """A tensor over the buffer's own memory, which lives as long as it does."""
    return torch.frombuffer(buffer.memory, dtype=_BY_NAME[buffer.dtype]).view(buffer.shape)
