"""The same hand-off with bare sockets and no protocol at all.

The copies are ours: the client copies in, the rank copies to memory of its own (as to a device) and back out,
the client reads the answer where it lies.
"""

from __future__ import annotations

import os
import socket

import torch

from bench.handoff import mapping
from bench.handoff.echo import Echo
from bench.handoff.payloads import SENT
from bench.handoff.peers import EVERY
from bench.handoff.peers.relay import WORD, Line


class Raw3:
    name = "raw3"
    says = "the same copies as xditd, with bare SEQPACKET sockets and no protocol"
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
    """Copies the inputs to its own memory, and the answer back."""
    torch.set_num_threads(1)
    daemon, shared, echo = socket.socket(fileno=socket_fd), mapping.Mapping(memory_fd), Echo()
    own = {
        payload.name: {
            name: torch.zeros(form.shape, dtype=form.dtype) for name, form in payload.inputs.items()
        }
        for payload in SENT
    }
    while word := daemon.recv(WORD):
        payload = word.decode().rstrip()
        for name, tensor in own[payload].items():
            tensor.copy_(shared.inputs[payload][name])
        shared.output[payload].copy_(echo(own[payload]))
        daemon.send(word)
