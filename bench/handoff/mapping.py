"""Shared memory for the bare peers: one memfd, every page touched, with a place for each tensor of a payload."""

from __future__ import annotations

import mmap
import os

import torch

from bench.handoff.payloads import SENT, Form

ALIGNMENT = 64


class Mapping:
    """The inputs and the output of each payload as tensors over shared pages."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _LENGTH)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        whole[:: mmap.PAGESIZE] = (
            0  # a page's first touch costs microseconds; nobody is to pay it in a timed call
        )
        self.inputs = {
            name: {key: self._view(place, form) for key, (place, form) in places.items()}
            for name, (places, _) in _PLACES.items()
        }
        self.output = {name: self._view(*output) for name, (_, output) in _PLACES.items()}

    def _view(self, place: int, form: Form) -> torch.Tensor:
        count = form.nbytes // form.dtype.itemsize
        return torch.frombuffer(self._memory, dtype=form.dtype, count=count, offset=place).view(form.shape)


def create() -> int:
    """A memfd that holds a `Mapping`."""
    fd = os.memfd_create("bench-handoff")
    os.ftruncate(fd, _LENGTH)
    return fd


def _lay_out() -> tuple[dict, int]:
    places, end = {}, 0

    def place(form: Form) -> tuple[int, Form]:
        nonlocal end
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + form.nbytes
        return begin, form

    for payload in SENT:
        inputs = {key: place(form) for key, form in payload.inputs.items()}
        places[payload.name] = (inputs, place(payload.output))
    return places, end


_PLACES, _LENGTH = _lay_out()
