"""The middle process of the bare peers: 64 bytes from one AF_UNIX socket to the other, and back."""

from __future__ import annotations

import socket
import subprocess

from bench.handoff import child

WORD = 64
"""Bytes of every message: a payload's name, padded."""


def relay(client_fd: int, rank_fd: int) -> None:
    """The daemon's body: forwards until the client is gone."""
    client, rank = socket.socket(fileno=client_fd), socket.socket(fileno=rank_fd)
    while word := client.recv(WORD):
        rank.send(word)
        client.send(rank.recv(WORD))


class Line:
    """A client's end of client, relay and rank; the rank is `module.rank(socket fd, memory fd)`."""

    def __init__(self, module: str, memory: int) -> None:
        kind = socket.SOCK_SEQPACKET
        self._socket, client_end = socket.socketpair(socket.AF_UNIX, kind)
        rank_end, rank_socket = socket.socketpair(socket.AF_UNIX, kind)
        self._children: list[subprocess.Popen[bytes]] = [
            child.start(module, "rank", rank_socket.fileno(), memory),
            child.start(__name__, "relay", client_end.fileno(), rank_end.fileno()),
        ]
        for inherited in (client_end, rank_end, rank_socket):
            inherited.close()
        self.call("S")  # answered once both processes are up and every page is theirs

    def call(self, payload: str) -> None:
        """Has the rank do a payload; returns when it is done."""
        self._socket.send(payload.encode().ljust(WORD))
        if not self._socket.recv(WORD):
            raise RuntimeError("A process of this peer has ended.")

    def close(self) -> None:
        self._socket.close()
        child.end(self._children)
