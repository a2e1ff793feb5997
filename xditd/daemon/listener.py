"""A listening AF_UNIX socket that outlives a lack of descriptors. It knows nothing of who connects or why.

Packets are whole (SEQPACKET), only the user and the group may connect, and each connection is handed on at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable

from xditd.protocol.errors import Code, XditError

log = logging.getLogger(__name__)

_BACKLOG = 128

_PAUSE = 1.0
"""Seconds without accepting where even a refusal takes a descriptor too many."""


class Listener:
    """One socket file.

    Args:
        path: of the socket. A stale one is replaced: see to it that no other daemon runs before `start`.
        take: called with each connection, non-blocking, which is the callee's.
        refuse: called with a connection that can not be kept, to say so at once; closed afterwards.
    """

    def __init__(
        self, path: str, take: Callable[[socket.socket], None], refuse: Callable[[socket.socket], object]
    ) -> None:
        self.path = path
        self._take = take
        self._refuse = refuse
        self._socket: socket.socket | None = None
        self._spare = -1  # a descriptor to be had when there is none
        self._inode = (0, 0)

    def start(self) -> None:
        """Listens, on the running event loop.

        Raises:
            XditError: `bad_config` where the path can not be a socket.
        """
        listening = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            _clear_stale(self.path)
            listening.bind(self.path)
            os.chmod(self.path, 0o660)  # before listen: nobody can connect under other rights
            listening.listen(_BACKLOG)
            found = os.stat(self.path)
        except OSError as error:
            listening.close()
            raise XditError(
                Code.BAD_CONFIG,
                f"Cannot listen on {self.path}: {error.strerror or error}. Name a path in a folder that exists and "
                "that this user may write to.",
            ) from error
        except BaseException:
            listening.close()
            raise
        self._inode = (found.st_dev, found.st_ino)
        self._socket = listening
        self._save_one()
        asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def close(self) -> None:
        """Stops listening and removes the socket file, if it is still this one."""
        listening, self._socket = self._socket, None
        if listening is None:
            return
        asyncio.get_running_loop().remove_reader(listening.fileno())
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self.path)
        listening.close()
        self._spend_one()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._turn_away(listening):
                    continue
                log.error("%s takes no connections: %s.", self.path, error.strerror)
                self._pause(listening)
                return
            connection.setblocking(False)
            self._take(connection)

    def _turn_away(self, listening: socket.socket) -> bool:
        """Spends the spare descriptor to refuse a client, which would otherwise wait unanswered."""
        if not self._spend_one():
            return False
        try:
            connection, _ = listening.accept()
            with connection:
                self._refuse(connection)
        except OSError:
            return False
        finally:
            self._save_one()
        log.warning("A client was turned away: no file descriptors are left.")
        return True

    def _pause(self, listening: socket.socket) -> None:
        """Stops accepting for a while: a socket that can not accept stays readable, and the loop would spin."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())

        def resume() -> None:
            if self._socket is listening:
                self._save_one()
                loop.add_reader(listening.fileno(), self._accept, listening)

        loop.call_later(_PAUSE, resume)

    def _save_one(self) -> None:
        if self._spare < 0:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _spend_one(self) -> bool:
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)
        return spare >= 0


def _clear_stale(path: str) -> None:
    """Removes a socket that a killed daemon left; refuses to remove anything else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise XditError(Code.BAD_CONFIG, f"{path} exists and is no socket; name another path or remove it.")
    os.unlink(path)
