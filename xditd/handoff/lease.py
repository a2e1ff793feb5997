"""A lease: the client's end of the connection that its shared memory hangs on. It knows no slots.

While the connection lives, the daemon keeps the client's segments; when either end goes, by whatever death, the
other sees end of file. So a lease must not be held open by accident: a forked child closes its copy.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import Struct

from xditd.handoff import passing, records
from xditd.handoff.lane import Lane
from xditd.handoff.segments import Segment
from xditd.protocol.errors import Code, XditError

T = TypeVar("T")


class Lease:
    """Connects to a daemon's arena socket and receives a token and the first segment.

    `grow` and `open_lane` are for one thread at a time.

    Args:
        path: the arena socket.
        timeout: seconds for all of it.

    Attributes:
        token: to present in `Hello`, once.
        first: the first segment's id and memory, until somebody takes it over.

    Raises:
        OSError: as connect does: FileNotFoundError, ConnectionRefusedError, PermissionError.
        XditError: `arena_exhausted` where the daemon has no memory for another client, `unsupported_version`,
            `daemon_lost`, `timeout`.
    """

    def __init__(self, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._sock = _connect(path, deadline)
        _held.add(self)
        self._hangup = select.poll()
        self._hangup.register(self._sock.fileno(), select.POLLRDHUP)
        try:
            record, fd = self._receive(max(0.05, deadline - time.monotonic()), records.Leased)
            segment = Segment(fd, record.nbytes)
            if record.version != records.VERSION:
                raise XditError(
                    Code.UNSUPPORTED_VERSION,
                    f"The daemon passes shared memory by version {record.version} of the exchange and this client "
                    f"by version {records.VERSION}; update the older of the two.",
                )
        except BaseException:
            self.close()
            raise
        self.token = record.token
        self.first = (record.segment, segment)

    def grow(self, nbytes: int, timeout: float = 60.0) -> tuple[int, Segment]:
        """Another segment of at least `nbytes`: its id and memory.

        Raises:
            XditError: `arena_exhausted` where the daemon grants no more; `daemon_lost` where it is gone or did not
                answer in time, which ends the lease.
        """
        return self._ask(
            records.Grow(nbytes=nbytes),
            records.Segment,
            lambda record, fd: (record.segment, Segment(fd, record.nbytes)),
            timeout,
        )

    def open_lane(self, timeout: float = 60.0) -> Lane:
        """A lane for the requests of steps. Once, when the daemon has welcomed the token.

        Raises:
            XditError: as `grow` does.
        """
        return self._ask(records.OpenLane(), records.LaneOpened, lambda record, fd: Lane(fd), timeout)

    @property
    def gone(self) -> bool:
        """Whether the daemon's end is gone, or this end is closed."""
        return self._sock.fileno() < 0 or bool(self._hangup.poll(0))

    def fileno(self) -> int:
        """For poll with POLLRDHUP: end of file means that the daemon is gone. -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Ends the lease. What is mapped stays mapped until its last view is gone."""
        _held.discard(self)
        self._sock.close()

    def _ask(self, question: Struct, kind: type[Struct], take: Callable[[Any, int], T], timeout: float) -> T:
        """Asks for what comes with a descriptor. An answer that comes too late would be taken for the next one's, so
        the lease ends with most errors."""
        try:
            passing.send(self._sock, question)
            return take(*self._receive(timeout, kind))
        except OSError as error:
            raise _gone() from error
        except XditError as error:
            if error.code != Code.ARENA_EXHAUSTED:
                self.close()
            raise

    def _receive(self, timeout: float, kind: type[Struct]) -> tuple[Any, int]:
        """A record of that kind and its descriptor."""
        try:
            record, fd = passing.receive(self._sock, records.ToClient, timeout)
        except passing.EndOfFile as error:
            raise _gone() from error
        if isinstance(record, kind) and fd is not None:
            return record, fd
        if fd is not None:
            os.close(fd)
        if isinstance(record, records.Refused):
            raise XditError(record.code, record.message)
        raise XditError(
            Code.BAD_MESSAGE, f"The daemon passed no {kind.__name__} with a descriptor where one was due."
        )


def _connect(path: str, deadline: float) -> socket.socket:
    """Connects, waiting where the daemon's backlog is full."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(max(0.05, deadline - time.monotonic()))
        sock.connect(path)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _gone() -> XditError:
    return XditError(
        Code.DAEMON_LOST, "The daemon ended or closed the connection of this client's shared memory."
    )


_held: weakref.WeakSet[Lease] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lease in list(_held):
        with contextlib.suppress(OSError):
            lease.close()


os.register_at_fork(after_in_child=_forget_in_child)
