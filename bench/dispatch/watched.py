"""`python -m bench.dispatch.watched`: the daemon, with a clock around its decisions and around its event loop's callbacks.

CPU time of the thread, not time on the wall: what else the machine does is not the daemon's. Writes what it saw as JSON
to the file that XDITD_BENCH_WATCH names, when the daemon ends.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xditd.daemon import __main__ as daemon
from xditd.daemon.dispatcher import Dispatcher
from xditd.daemon.executor import LocalExecutor
from xditd.daemon.placing import Placing
from xditd.daemon.turns import Turns

VARIABLE = "XDITD_BENCH_WATCH"

DECISIONS = {
    "place: which run, which group": (Dispatcher, "_place"),
    "choose: which replica": (Placing, "_choose"),
    "turn: whose is next": (Turns, "next"),
}
"""What is decided. `_place` also tells the client and the ranks of every run that it binds."""

CALLS = {
    "open_run, with all that follows": (Dispatcher, "open"),
    "denoise or sample, with all that follows": (Dispatcher, "ask"),
    "turn done, with all that follows": (Dispatcher, "turn_done"),
    "run ended, with all that follows": (Dispatcher, "stop"),
    "tick": (Dispatcher, "tick"),
}
"""What happens to the core: decisions, answers to clients, orders to ranks."""

times: dict[str, list[float]] = {name: [] for name in (*DECISIONS, *CALLS)}
callbacks: list[tuple[float, float, bool]] = []
"""CPU seconds and wall seconds of each callback of the event loop, and whether a process was started in it."""

spawned = [0]


def clocked(times: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.thread_time()
        try:
            return call(*arguments, **named)
        finally:
            times.append(time.thread_time() - begin)

    return timed


def watch() -> None:
    for name, (owner, method) in {**DECISIONS, **CALLS}.items():
        setattr(owner, method, clocked(times[name], getattr(owner, method)))
    spawn = LocalExecutor.spawn
    run = asyncio.Handle._run

    def counted(*arguments: Any) -> Any:
        spawned[0] += 1
        return spawn(*arguments)

    def timed(handle: asyncio.Handle) -> None:
        before = spawned[0]
        cpu, wall = time.thread_time(), time.perf_counter()
        run(handle)
        callbacks.append((time.thread_time() - cpu, time.perf_counter() - wall, spawned[0] > before))

    LocalExecutor.spawn = counted  # type: ignore[method-assign]
    asyncio.Handle._run = timed  # type: ignore[method-assign]


def main() -> int:
    watch()
    try:
        return daemon.main()
    finally:
        seen = {"times": times, "callbacks": callbacks}
        Path(os.environ[VARIABLE]).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
