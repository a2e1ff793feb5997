"""The device of a rank: bound once, asked for its memory, and whether it survived an exception."""

from __future__ import annotations

import time

import torch

MEMORY_EVERY = 1.0
"""Seconds between two tellings of the memory: asking costs a tenth of a millisecond, which a turn need not pay."""


class Device:
    """A CPU or one GPU.

    Args:
        name: "cpu:1" (which of the CPU's ranks it is means nothing to torch), "cuda:0".
    """

    def __init__(self, name: str) -> None:
        self.is_cuda = name.startswith("cuda")
        self.torch = torch.device(name if self.is_cuda else "cpu")
        self._told = -MEMORY_EVERY
        if self.is_cuda:
            torch.cuda.set_device(self.torch)  # before NCCL: its communicators take the current device

    def memory(self) -> int | None:
        """Bytes that torch reserves on a GPU; None on a CPU, and where it was told within MEMORY_EVERY."""
        now = time.monotonic()
        if not self.is_cuda or now - self._told < MEMORY_EVERY:
            return None
        self._told = now
        return torch.cuda.memory_reserved(self.torch)

    def settle(self) -> None:
        """Weights have come or gone: what torch keeps for later is given back, and the memory is told when next asked."""
        self._told = -MEMORY_EVERY
        if self.is_cuda:
            torch.cuda.empty_cache()

    def usable(self) -> bool:
        """Whether it still computes. After most CUDA errors a process's context never does again."""
        if not self.is_cuda:
            return True
        try:
            torch.cuda.synchronize(self.torch)
            torch.cuda.empty_cache()
            torch.zeros(1, device=self.torch).add_(1).item()
        except RuntimeError:  # what every CUDA error is; which one does not matter here
            return False
        return True
