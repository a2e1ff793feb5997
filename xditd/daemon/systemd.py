"""What the daemon tells systemd: ready, status, stopping, and that its event loop still turns.

The protocol of sd_notify(3), spoken directly: one datagram per message. Without systemd every call does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)


class Notifier:
    """The way to the service manager.

    Attributes:
        address: of its socket: a path, or "@name" for an abstract one; "" where nobody asked to be told.
        watchdog: seconds within which it wants to hear from us; 0 where it does not.
    """

    __slots__ = ("_socket", "address", "watchdog")

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        self.address = address
        self.watchdog = watchdog
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] | None = None) -> Notifier:
        """The notifier that systemd's variables describe. They are taken out: ranks must not speak for the daemon."""
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", "")
        watched = microseconds.isdecimal() and meant in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if watched else 0.0)

    def ready(self, status: str) -> None:
        """Serving from now on: units that wait for this one may start."""
        self.send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """One sentence for `systemctl status`."""
        self.send(f"STATUS={_line(status)}")

    def stopping(self, status: str) -> None:
        """On the way out, orderly."""
        self.send(f"STOPPING=1\nSTATUS={_line(status)}")

    async def keep_watchdog(self) -> None:
        """Says at half of the asked interval that the event loop turns; runs until cancelled.

        It must be a task of the loop that serves: a thread of its own would vouch for a loop that hangs.
        """
        if not self.watchdog:
            return
        while True:
            self.send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog / 2)

    def send(self, message: str) -> None:
        """One datagram. One that cannot be sent is logged: systemd then acts as if it was not said."""
        if self._socket is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            self._socket.sendto(message.encode(), address)
        except OSError as error:
            log.warning(
                "systemd could not be told %s: %s.", message.split("\n", 1)[0], error.strerror or error
            )

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _line(text: str) -> str:
    """Without line breaks: each line of the datagram is a variable of its own."""
    return " ".join(text.split())
