"""Idle is idle: a daemon with warm ranks takes next to no CPU time, and no rank waits in a collective."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.live.conftest import Serve
from tests.live.service import Service
from xditd.protocol.messages import PlanRequest

WAITING = {7: "poll", 23: "select", 232: "epoll_wait", 270: "pselect6", 271: "ppoll", 281: "epoll_pwait"}
"""System calls of x86-64 in which a thread waits for descriptors. One that waits for its peers waits in a futex."""


GLOO = 0.15
"""Share of a core that a rank with a world may take: each of xfuser's gloo groups has a thread that looks 100 times a
second whether it is to end (measured: some 3 % of a core in all)."""


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main_thread_seconds(process: psutil.Process) -> float:
    return next(t.user_time + t.system_time for t in process.threads() if t.id == process.pid)


def waits_in(pid: int) -> int:
    """The system call that the process's main thread is in."""
    return int(Path(f"/proc/{pid}/task/{pid}/syscall").read_text().split()[0])


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(120.0, marks=[pytest.mark.soak, pytest.mark.timeout(300)])]
)
def test_an_idle_daemon_with_warm_ranks_takes_next_to_no_time(serve: Serve, seconds: float) -> None:
    service: Service = serve()
    with service.client() as client:
        client.load("diffusion_models/flux.safetensors", PlanRequest(ulysses=2))
        client.load("echo/echo", PlanRequest(replicas=2))
        daemon, ranks = psutil.Process(service.process.pid), service.ranks()
        assert len(ranks) == 4
        everybody = [daemon, *ranks]
        begin = time.monotonic()
        before = [cpu_seconds(process) for process in everybody]
        mains = [main_thread_seconds(rank) for rank in ranks]
        time.sleep(seconds)  # this is what is measured: nothing happens
        lasted = time.monotonic() - begin
        shares = [
            (cpu_seconds(process) - spent) / lasted for process, spent in zip(everybody, before, strict=True)
        ]
        own = [(main_thread_seconds(rank) - spent) / lasted for rank, spent in zip(ranks, mains, strict=True)]
        print(
            f"\n  idle for {seconds:g} s, shares of a core: daemon {shares[0]:.2%}, "
            f"ranks {', '.join(f'{share:.2%}' for share in shares[1:])}, their main threads at most {max(own):.2%}",
            end="",
        )
        assert shares[0] < 0.03
        assert max(own) < 0.01
        assert max(shares[1:]) < GLOO
        try:
            calls = {process.pid: waits_in(process.pid) for process in service.ranks()}
        except (PermissionError, ValueError) as error:
            pytest.skip(f"the kernel does not tell what a process waits for: {error}")
        assert set(calls.values()) <= set(WAITING), calls
