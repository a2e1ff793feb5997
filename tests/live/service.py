"""A real daemon in a process of its own, for tests: started, waited for, looked into, stopped or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.warm import Forked, warmth
from xditd.client import Client

T = TypeVar("T")

OWN_WAY = frozenset({"nursery", "debug.rank_command"})
"""Settings that say how ranks start. Without them a daemon has a nursery that is warm from the start (`tests.warm`)."""


class Service:
    """`python -m xditd.daemon` with a folder of its own, and imports that all tests share.

    Args:
        folder: for its socket, log and runtime files.
        settings: configuration by dotted key, as `--set` takes it.
        environment: variables, beyond this process's own.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.endpoint = f"ipc://{folder}/xditd.sock"
        self.log = folder / "log"
        arguments = [f"--set={key}={_toml(value)}" for key, value in settings.items()]
        with self.log.open("ab") as log:
            before = log.tell()
            arguments.insert(0, f"--set=endpoint={self.endpoint}")
            variables = {**os.environ, "NOTIFY_SOCKET": "", **(environment or {})}
            self.process: Forked | subprocess.Popen[bytes]
            if settings.get("devices.kind") == "cpu" and not OWN_WAY.intersection(settings):
                self.process = warmth().daemon(arguments, log.fileno(), variables)
            else:
                command = [sys.executable, "-m", "xditd.daemon", *arguments]
                self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        wait_for(
            lambda: "Serving on" in self.said()[before:] or self.process.poll() is not None,
            "the daemon to serve",
        )
        assert self.process.poll() is None, self.said()

    def client(self, **arguments: Any) -> Client:
        return Client(self.endpoint, **arguments)

    def said(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if not is_nursery(child)]

    def nursery(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if is_nursery(child))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss(self) -> int:
        """Bytes of memory that the daemon and its ranks hold, shared memory counted once for each."""
        return sum(process.memory_info().rss for process in [psutil.Process(self.process.pid), *self.ranks()])

    def stop(self) -> int:
        """As systemd stops it. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@contextmanager
def serving(folder: Path, environment: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Service]:
    """A daemon for as long as its tests take: on a CPU and with small arenas, unless the settings say otherwise."""
    service = Service(folder, {"devices.kind": "cpu", "arena.first_bytes": "4MiB", **settings}, environment)
    try:
        yield service
    finally:
        try:
            service.stop()
        except subprocess.TimeoutExpired:
            service.kill()
            raise


def is_nursery(process: psutil.Process) -> bool:
    """A rank that it forked has its command line, and a name of its own."""
    name = process.name()
    return name == "xditd-nursery" or (name != "xditd-rank" and "xditd.rank.nursery" in process.cmdline())


def wait_for(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """Waits until the condition holds, looking every few milliseconds: for what sends no event."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(0.005)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return f'"{value}"' if isinstance(value, (str, Path)) else str(value)
