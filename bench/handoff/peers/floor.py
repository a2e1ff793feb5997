"""The floor: the inputs are copied in, the answer is copied out, and 64 bytes go through three processes."""

from __future__ import annotations

import os
import socket

import torch

from bench.handoff import mapping
from bench.handoff.echo import Echo
from bench.handoff.peers import EVERY
from bench.handoff.peers.relay import WORD, Line


class Floor:
    name = "floor"
    says = "one memcpy into and one out of a pre-faulted mapping, and a 64-byte AF_UNIX relay"
    payloads = EVERY

    def start(self) -> None:
        fd = mapping.create()
        self._shared = mapping.Mapping(fd)
        self._line = Line(__name__, fd)
        os.close(fd)

    def prepare(self, payload: str) -> None:
        """Nothing is kept between jobs."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        places = self._shared.inputs[payload]
        for name, tensor in inputs.items():
            places[name].copy_(tensor)
        self._line.call(payload)
        return self._shared.output[payload]

    def stop(self) -> None:
        self._line.close()


def rank(socket_fd: int, memory_fd: int) -> None:
    """Reads the inputs where they lie, and copies the answer out."""
    torch.set_num_threads(1)
    daemon, shared, echo = socket.socket(fileno=socket_fd), mapping.Mapping(memory_fd), Echo()
    while word := daemon.recv(WORD):
        payload = word.decode().rstrip()
        shared.output[payload].copy_(echo(shared.inputs[payload]))
        daemon.send(word)
