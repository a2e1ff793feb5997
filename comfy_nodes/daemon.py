"""The one connection to each daemon, for all nodes of this process, and how waiting feels in ComfyUI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import comfy.utils
import comfyui_version

from xditd.client import Client, Degraded
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError

from .say import say

RETURNS = 30.0
"""Seconds that a daemon which was just there is given to come back: systemd starts it again after one or two."""

TIMEOUT = 10.0
"""Seconds to find a daemon in, and for its answers that need no GPU: a person sits in front of the node."""

T = TypeVar("T")

_clients: dict[str, Client] = {}
_lock = threading.Lock()


def client(endpoint: str) -> Client:
    """The client of an endpoint; "" is wherever a client looks. It connects when it is first used, and again."""
    with _lock:
        if endpoint not in _clients:
            name = f"ComfyUI {comfyui_version.__version__}"
            _clients[endpoint] = Client(endpoint or None, name=name, timeout=TIMEOUT)
        return _clients[endpoint]


def interrupt() -> None:
    """Raises where the user has pressed Cancel. What the client calls every 20 ms while it waits."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def telling(what: str) -> Callable[[Any], None]:
    """Shows on the node that waits what the daemon says while it does.

    Args:
        what: is waited for.
    """

    bars: list[comfy.utils.ProgressBar] = []

    def tell(event: Any) -> None:
        if isinstance(event, m.Queued):
            if event.total:
                if not bars:
                    bars.append(comfy.utils.ProgressBar(event.total))
                bars[0].update_absolute(event.loaded, event.total)
            if event.position:
                about = "" if event.estimate is None else f", about {event.estimate:.0f} s"
                say(f"⏳ {what}: {event.position} before it{about}")
            elif event.phase != "waiting":
                say(f"⏳ {what}: {event.phase}")
        elif isinstance(event, m.Rebound):
            say(f"⚠️ {event.reason}: it goes on with {event.group}; the result is a true one")
        elif isinstance(event, Degraded):
            say(f"⚠️ {what}: degraded: {event.reason}")

    return tell


def patiently(ask: Callable[[], T]) -> T:
    """Asks a daemon that was there before; where it is gone, until it has come back.

    Raises:
        XditError: what the daemon says, or `daemon_not_found` after a while.
    """
    until = time.monotonic() + RETURNS
    while True:
        try:
            return ask()
        except XditError as error:
            gone = error.code in (Code.DAEMON_NOT_FOUND, Code.DAEMON_LOST, Code.STOPPING)
            if not gone or time.monotonic() > until:
                raise
        say("⏳ the daemon is gone; waiting for it to come back")
        interrupt()
        time.sleep(0.05)
