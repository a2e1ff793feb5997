"""A ZeroMQ ROUTER on the event loop, driven from its descriptor: no zmq.asyncio, which costs 65–100 µs a round trip.

The descriptor is edge-triggered: it tells that something *may* have changed, once. So every send and receive is
followed by a look at whether more waits, and the socket is drained whenever it is touched.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

import zmq

Receive = Callable[[bytes, bytes, "list[zmq.Frame]"], None]
"""Called with (peer identity, header, frames) for every message of two frames or more."""

_ROUNDS = 64
"""Messages read in one go before the event loop gets its turn again."""


class Wire:
    """One bound ROUTER socket."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, receive: Receive, **options: int) -> None:
        """
        Args:
            options: ZeroMQ socket options by name, MAXMSGSIZE=…

        Raises:
            zmq.ZMQError: the endpoint cannot be bound.
        """
        self.endpoint = endpoint
        self.receive = receive
        self._loop = asyncio.get_running_loop()
        self._again = False
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        for name, value in options.items():
            self._socket.setsockopt(getattr(zmq, name), value)
        self.listening = False
        self.listen(True)
        self._fd = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self.drain)

    def listen(self, wanted: bool) -> None:
        """Takes new connections, or takes none while those there are stay. Whoever may reach the folder may connect."""
        if wanted and not self.listening:
            self._socket.bind(self.endpoint)
            if self.endpoint.startswith("ipc://"):
                os.chmod(self.endpoint[len("ipc://") :], 0o660)
        elif self.listening and not wanted:
            self._socket.unbind(self.endpoint)
        self.listening = wanted

    def send(self, peer: bytes, header: bytes, frames: Sequence[Any] = ()) -> bool:
        """Sends without waiting.

        Returns:
            False where the peer is gone, or reads so slowly that its queue is full.
        """
        try:
            if frames:
                self._socket.send_multipart([peer, header, *frames], zmq.NOBLOCK, copy=False)
            else:
                self._socket.send_multipart([peer, header], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        finally:
            self._look_again()
        return True

    def drain(self) -> None:
        """Hands over what has arrived."""
        for _ in range(_ROUNDS):
            try:
                peer = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            parts: list[zmq.Frame] = []
            while self._socket.rcvmore:
                parts.append(self._socket.recv(zmq.NOBLOCK, copy=False))
            if parts:
                self.receive(peer, parts[0].bytes, parts[1:])
        self._look_again()

    def _look_again(self) -> None:
        """A send may have swallowed the edge that announced a message."""
        if not self._again and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._again = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._again = False
        if not self._socket.closed:
            self.drain()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close()
