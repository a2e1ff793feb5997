"""The floor: the inputs are copied in, the answer is copied out, and 64 bytes go through three processes."""

from __future__ import annotations

import socket

import torch

from bench.handoff import mapping
from bench.handoff.echo import Echo
from bench.handoff.peers.relay import WORD, Bare


class Floor(Bare):
    name = "floor"
    says = "one memcpy into and one out of a pre-faulted mapping, and a 64-byte AF_UNIX relay"


def rank(socket_fd: int, memory_fd: int) -> None:
    """Reads the inputs where they lie, and copies the answer out."""
    torch.set_num_threads(1)
    daemon, shared, echo = socket.socket(fileno=socket_fd), mapping.Mapping(memory_fd), Echo()
    while word := daemon.recv(WORD):
        payload = word.decode().rstrip()
        shared.output[payload].copy_(echo(shared.inputs[payload]))
        daemon.send(word)
