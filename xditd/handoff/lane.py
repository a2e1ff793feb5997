"""A lane: an AF_UNIX pair for the messages of a step, beside ZeroMQ. It knows bytes, no messages.

ZeroMQ hands every message from its sender's thread to its own, and on the other side back: two more wake-ups than a
plain socket, of 10 to 60 µs each, four times a step. A lane saves them. It is a shortcut and never the only way: what
finds no room on it goes by ZeroMQ, byte for byte the same.
"""

from __future__ import annotations

import socket

from xditd.protocol.codec import MAX_HEADER

_MOST = MAX_HEADER + 64
"""Bytes that are read of one message; enough for what may come before a header, and to see that one is too long."""


class Lane:
    """One end, for one thread at a time. Never blocks.

    Args:
        fd: of the end; taken over.
    """

    __slots__ = ("_socket",)

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)

    def send(self, message: bytes) -> bool:
        """Sends a message whole. False where there is no room, or nobody at the other end."""
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next message; None where none has come; empty where the other end is gone."""
        try:
            return self._socket.recv(_MOST)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionError:
            return b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def pair() -> tuple[Lane, int]:
    """A lane, and the descriptor of its other end, to be passed to another process and closed here.

    Raises:
        OSError: no descriptors are left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Lane(ours.detach()), theirs.detach()
