"""`python -m bench.dispatch.watched`: the daemon, with a clock around its decisions and around its event loop's callbacks.

CPU time of the thread, not time on the wall: what else the machine does is not the daemon's. The loop is asyncio's own,
whose callbacks can be timed; on uvloop, which a daemon takes where it is installed, they are no longer. Writes what it saw as JSON
to the file that XDITD_BENCH_WATCH names, when the daemon ends.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from array import array
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
    "place: which run, which group": (Placing, "next"),
    "choose: which replica": (Placing, "_choose"),
    "turn: whose is next": (Turns, "next"),
}
"""What is decided; the second is a part of the first, where several replicas have room. A look at which there is nothing to
decide, as there is after every decision, is not counted: it takes no time, and would make the others look shorter."""

CALLS = {
    "bind: the client and the ranks of a run are told of its place": (Dispatcher, "_bind"),
    "open_run, with all that follows": (Dispatcher, "open"),
    "denoise or sample, with all that follows": (Dispatcher, "ask"),
    "turn done, with all that follows": (Dispatcher, "turn_done"),
    "run ended, with all that follows": (Dispatcher, "stop"),
    "tick": (Dispatcher, "tick"),
}
"""What happens to the core: decisions, answers to clients, orders to ranks."""

# Arrays: lists of so many floats would have the garbage collector look at them, in the time that is measured.
times = {name: array("d") for name in (*DECISIONS, *CALLS)}
callbacks = {name: array("d") for name in ("cpu", "wall", "spawned")}
"""CPU seconds and wall seconds of each callback of the event loop, and how many processes were started in it."""

spawned = [0]


def clocked(times: array[float], call: Callable[..., Any], *, decides: bool = False) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.thread_time()
        result = call(*arguments, **named)
        took = time.thread_time() - begin
        if result is not None or not decides:
            times.append(took)
        return result

    return timed


def watch() -> None:
    for name, (owner, method) in {**DECISIONS, **CALLS}.items():
        setattr(owner, method, clocked(times[name], getattr(owner, method), decides=name in DECISIONS))
    spawn = LocalExecutor.spawn
    run = asyncio.Handle._run

    def counted(*arguments: Any) -> Any:
        spawned[0] += 1
        return spawn(*arguments)

    def timed(handle: asyncio.Handle) -> None:
        before = spawned[0]
        cpu, wall = time.thread_time(), time.perf_counter()
        run(handle)
        callbacks["cpu"].append(time.thread_time() - cpu)
        callbacks["wall"].append(time.perf_counter() - wall)
        callbacks["spawned"].append(spawned[0] - before)

    sys.modules["uvloop"] = None  # type: ignore[assignment]
    LocalExecutor.spawn = counted  # type: ignore[method-assign]
    asyncio.Handle._run = timed  # type: ignore[method-assign]


def main() -> int:
    watch()
    try:
        return daemon.main()
    finally:
        seen = {
            "times": {name: list(values) for name, values in times.items()},
            "callbacks": {name: list(values) for name, values in callbacks.items()},
        }
        Path(os.environ[VARIABLE]).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
