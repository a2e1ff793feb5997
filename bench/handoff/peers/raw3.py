"""The same hand-off with bare sockets and no protocol at all.

The copies are ours: the client copies in, the rank copies to memory of its own (as to a device) and back out,
the client reads the answer where it lies.
"""

from __future__ import annotations

import socket

import torch

from bench.handoff import mapping
from bench.handoff.echo import Echo
from bench.handoff.payloads import SENT
from bench.handoff.peers.relay import WORD, Bare


class Raw3(Bare):
    name = "raw3"
    says = "the same copies as xditd, with bare SEQPACKET sockets and no protocol"


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
