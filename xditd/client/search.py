"""The search for a daemon: tries every endpoint until one answers or the time is over. It knows no requests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import zmq

from xditd.client.connection import TICK, Connection
from xditd.handoff.arena import Arena
from xditd.handoff.lease import Lease
from xditd.protocol import endpoints
from xditd.protocol.endpoints import Endpoint
from xditd.protocol.errors import Code, XditError

_PAUSE = 0.05
"""Seconds between two rounds."""

_HANDSHAKE = 2.0
"""Seconds that whoever listens has at least to answer, however short the time for the search is."""


def connect(
    context: zmq.Context[Any],
    explicit: str | None,
    *,
    name: str,
    shared_memory: bool,
    timeout: float,
    interrupt: Callable[[], None] | None = None,
) -> Connection:
    """An open connection to the first daemon that answers.

    Args:
        context: of the sockets.
        explicit: the one endpoint to try; None looks at the environment and the usual places.
        name: of the client.
        shared_memory: with False, no arena is asked for.
        timeout: seconds to go on trying; 0 tries every place once.
        interrupt: called every 20 ms; what it raises ends the search.

    Raises:
        XditError: `daemon_not_found` naming the places tried; at once where a daemon answers and refuses:
            `unsupported_version`, `arena_exhausted`, ...; `bad_value`, `not_permitted` for an endpoint that can not be.
    """
    places = endpoints.candidates(explicit)
    deadline = time.monotonic() + timeout
    while True:
        tried = []
        for place in places:
            left = max(deadline - time.monotonic(), _HANDSHAKE)
            try:
                return _open(context, place, name, shared_memory, left, interrupt)
            except (OSError, XditError) as error:
                tried.append((place, _outcome(error)))
        over = time.monotonic() >= deadline
        if over or all(outcome == endpoints.PERMISSION_DENIED for _, outcome in tried):
            raise endpoints.not_found(tried)
        pause = time.monotonic() + _PAUSE
        while time.monotonic() < pause:
            if interrupt is not None:
                interrupt()
            time.sleep(TICK)


def _open(
    context: zmq.Context[Any],
    place: Endpoint,
    name: str,
    shared_memory: bool,
    timeout: float,
    interrupt: Callable[[], None] | None,
) -> Connection:
    endpoints.check_owner(place)
    arena = None
    if place.path is not None and place.arena is not None:
        _knock(place.path, timeout)
        if shared_memory:
            arena = Arena(Lease(place.arena, timeout))
    connection = Connection(context, place, arena)
    try:
        connection.open(name, timeout, interrupt)
    except BaseException:
        connection.close(XditError(Code.DAEMON_LOST, "The daemon did not welcome this client."))
        raise
    return connection


def _knock(path: str, timeout: float) -> None:
    """Raises the OSError that ZeroMQ would keep to itself, retrying for ever, where nobody listens or may listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.settimeout(timeout)
        knock.connect(path)


def _outcome(error: OSError | XditError) -> str:
    """What came of a try, for the sentence; what waiting or another place can not mend is raised on."""
    if isinstance(error, XditError):
        if error.code in (Code.DAEMON_LOST, Code.TIMEOUT):
            return endpoints.NO_ANSWER
        raise error
    if isinstance(error, PermissionError):
        return endpoints.PERMISSION_DENIED
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return endpoints.NO_SOCKET
    if isinstance(error, ConnectionRefusedError):
        return endpoints.NOBODY_LISTENS
    return error.strerror or str(error)
