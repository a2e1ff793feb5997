"""Tensors between their places, this rank's device and the other ranks. Knows no model.

Rank 0 alone reads a client's bytes and sends them to the others: a client that writes while it is read cannot make
ranks differ. On a GPU bytes go through pinned buffers, which torch's host allocator keeps for the next turn: one
copy in host memory and one to the device, and back the same way, with one wait for the device a turn.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor
from xditd.rank.places import Frames, Places

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
"""The dtypes that travel (`protocol.tensors.ITEMSIZE`)."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Delivery = tuple[tuple[Tensor, ...], list[memoryview]]
"""Where results went, and the frames that those have that got no slot."""


class Transfer:
    """Receives and delivers tensors for one rank.

    Args:
        device: of this rank.
        rank, world: its place in the world; with more than one, torch.distributed is joined already.
        places: of orders' tensors; used by rank 0.
    """

    def __init__(self, device: torch.device, rank: int, world: int, places: Places) -> None:
        self.device = device
        self.rank = rank
        self.world = world
        self._places = places
        # torch warns of every buffer that it may not write; a frame is such, and only read.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")

    def receive(self, tensor: Tensor, frames: Frames, *, keep: bool = False) -> torch.Tensor:
        """A tensor on the device, on every rank. A collective.

        Args:
            tensor: which.
            frames: of its order; rank 0's count.
            keep: it outlives the turn, or is written to: never a view of the client's bytes.

        Raises:
            XditError: as `Places.bytes` does, on rank 0 alone.
        """
        if self.rank != 0:
            value = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=self.device)
        else:
            value = self._read(tensor, frames, keep=keep or self.world > 1)
        if self.world > 1:
            torch.distributed.broadcast(value, src=0)
        return value

    def deliver(self, results: Sequence[tuple[torch.Tensor, Tensor | None, str]], frames: Frames) -> Delivery:
        """Results to their places, on rank 0; elsewhere nothing. Waits for the device.

        Args:
            results: each with its slot (None makes a frame of it) and the dtype of a frame.
            frames: of the order.

        Raises:
            XditError: `bad_tensor` where a slot has another shape than its result.
        """
        if self.rank != 0:
            return (), []
        for value, slot, _ in results:
            if slot is not None and tuple(value.shape) != slot.shape:
                raise XditError(
                    Code.BAD_TENSOR, f"A result has shape {list(value.shape)}, its slot {list(slot.shape)}."
                )
        dtypes = [DTYPES[slot.dtype if slot is not None else name] for _, slot, name in results]
        values = [value for value, _, _ in results]
        if self.device.type == "cuda":
            values = self._to_host(values, dtypes)
        outputs: list[Tensor] = []
        inline: list[memoryview] = []
        for value, dtype, (_, slot, _) in zip(values, dtypes, results, strict=True):
            if slot is not None:
                _copy(value, _view(self._places.bytes(slot, frames), slot))
                outputs.append(slot)
            else:
                outputs.append(Tensor(dtype=NAMES[dtype], shape=tuple(value.shape), frame=len(inline)))
                inline.append(_raw(value.to(dtype).contiguous()))
        return tuple(outputs), inline

    def drop(self, segments: Sequence[int]) -> None:
        """Unmaps segments."""
        self._places.drop(segments)

    def _read(self, tensor: Tensor, frames: Frames, *, keep: bool) -> torch.Tensor:
        source = _view(self._places.bytes(tensor, frames), tensor)
        if self.device.type == "cuda":
            pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            _copy(source, pinned)
            return pinned.to(self.device, non_blocking=True)
        return source.clone() if keep else source

    def _to_host(self, values: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
        pinned = [
            torch.empty(value.shape, dtype=dtype, pin_memory=True)
            for value, dtype in zip(values, dtypes, strict=True)
        ]
        for host, value in zip(pinned, values, strict=True):
            host.copy_(value.to(host.dtype).contiguous(), non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return pinned


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies on the host by this thread alone.

    torch wakes its whole pool of threads for half a megabyte, which after the pause of a step costs milliseconds.
    """
    if source.dtype == target.dtype and source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _view(memory: memoryview, tensor: Tensor) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def _raw(value: torch.Tensor) -> memoryview:
    array: Any = value.view(-1).view(torch.uint8).numpy()
    raw: memoryview = array.data
    return raw
