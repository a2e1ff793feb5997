"""Arenas for tests, on an event loop of their own: in a thread, or with `python -m tests.handoff.host` in a process."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xditd.daemon.arenas import Arenas
from xditd.handoff.lease import Lease

MIB = 1 << 20


class Host:
    """Arenas in a thread; what a test does with them, it does there through `do`."""

    def __init__(self, path: Path, per_client: int = 8 * MIB, total: int = 32 * MIB, **options: Any) -> None:
        self.path = str(path)
        self.gone: list[str] = []
        self._news = threading.Condition()
        self._started = threading.Event()
        self._stopped = threading.Event()
        self._loop = asyncio.new_event_loop()
        self.arenas = Arenas(self.path, per_client, total, MIB, self._gone, **options)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Host:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.arenas.close(), self._loop).result(10)

    def do(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises in the arenas' thread."""

        async def there() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(there(), self._loop).result(10)

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits for something to become true in the arenas' thread."""
        deadline = time.monotonic() + 10
        while not self.do(holds):
            assert time.monotonic() < deadline, "it did not become true"
            time.sleep(0.002)

    def _run(self) -> None:
        self._loop.run_until_complete(self.arenas.start())
        self._started.set()
        self._loop.run_forever()

    def _gone(self, token: str) -> None:
        self.gone.append(token)


def lease(host: Host) -> Lease:
    return Lease(host.path, 10)


def descriptors(pid: int | str = "self") -> list[str]:
    """What the descriptors of a process point to."""
    targets = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            targets.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:  # the one that lists
            continue
    return targets


def segments_of(pid: int | str = "self") -> tuple[int, int]:
    """How many segments a process holds open, and how many it has mapped."""
    fds = sum("memfd:xditd" in target for target in descriptors(pid))
    maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:xditd")
    return fds, maps


@contextmanager
def open_files_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


if __name__ == "__main__":
    # python -m tests.handoff.host <path> <open files>: serves until its standard input ends.
    with open_files_limit(int(sys.argv[2])), Host(Path(sys.argv[1]), max_descriptors=1 << 20):
        print("ready", flush=True)
        sys.stdin.read()
