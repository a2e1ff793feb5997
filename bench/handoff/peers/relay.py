"""What the bare peers share: a mapping, and 64 bytes that go by AF_UNIX from a client through a relay to a rank."""

from __future__ import annotations

import os
import socket
import subprocess

import torch

from bench.handoff import child, mapping
from bench.handoff.peers import EVERY

WORD = 64
"""Bytes of every message: a payload's name, padded."""


def relay(client_fd: int, rank_fd: int) -> None:
    """The daemon's body: forwards until the client is gone."""
    client, rank = socket.socket(fileno=client_fd), socket.socket(fileno=rank_fd)
    while word := client.recv(WORD):
        rank.send(word)
        client.send(rank.recv(WORD))


class Bare:
    """The client of a bare peer. Its rank is the function `rank(socket fd, memory fd)` of the subclass's module."""

    payloads = EVERY

    def start(self) -> None:
        memory = mapping.create()
        self._shared = mapping.Mapping(memory)
        kind = socket.SOCK_SEQPACKET
        self._socket, client_end = socket.socketpair(socket.AF_UNIX, kind)
        rank_end, rank_socket = socket.socketpair(socket.AF_UNIX, kind)
        self._children: list[subprocess.Popen[bytes]] = [
            child.start(type(self).__module__, "rank", rank_socket.fileno(), memory),
            child.start(__name__, "relay", client_end.fileno(), rank_end.fileno()),
        ]
        for inherited in (client_end, rank_end, rank_socket):
            inherited.close()
        os.close(memory)
        self._call("S")  # answered once both processes are up and every page is theirs

    def prepare(self, payload: str) -> None:
        """Nothing is kept between jobs."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        places = self._shared.inputs[payload]
        for name, tensor in inputs.items():
            places[name].copy_(tensor)
        self._call(payload)
        return self._shared.output[payload]

    def stop(self) -> None:
        self._socket.close()
        child.end(self._children)

    def _call(self, payload: str) -> None:
        """Has the rank do a payload; returns when it is done."""
        self._socket.send(payload.encode().ljust(WORD))
        if not self._socket.recv(WORD):
            raise RuntimeError("A process of this peer has ended.")
