"""Fifty ranks forked and killed: nothing of them is left with the daemon, whichever moment they are killed at."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.daemon.world import World
from xditd.daemon import nursery as nurseries
from xditd.daemon.child import _PR_SET_CHILD_SUBREAPER, Child
from xditd.daemon.config import Config
from xditd.daemon.executor import LocalExecutor
from xditd.daemon.launch import environment, rank_specs
from xditd.daemon.nursery import Nursery
from xditd.protocol.orders import RankSpec

STARTS = 50


def spec_of(folder: Path) -> RankSpec:
    """A rank of a model; its file is not there, but it lives for some seconds to say so."""
    world = World()
    world.open()
    return msgspec.structs.replace(rank_specs(world.started[0], Config(), folder)[0], family="flux")


@pytest.fixture(autouse=True)
def pytest_adopts_no_orphans() -> Iterator[None]:
    """The nursery makes this process a subreaper: the dead of later tests would stay with it."""
    yield
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """Those of this process that it had not when the test began: tests before it have left it one that forks ranks (`tests.warm`)."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


async def until(condition: Callable[[], object]) -> None:
    """Looks every millisecond."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_fifty_starts_leave_no_descriptor_and_no_process(
    tmp_path: Path, children: Callable[[], list[psutil.Process]]
) -> None:
    told: list[tuple[str, int]] = []
    longest = [0.0]

    async def story() -> None:
        def born(*rank: object) -> None:
            told.append(("born", rank[-1]))

        def gone(*rank: object) -> None:
            told.append((rank[-1], rank[-2]))

        spec = spec_of(tmp_path)
        nursery = Nursery()
        nursery.start("cpu")
        executor = LocalExecutor(born, gone, lambda *heard: None, nursery=nursery)
        await until(lambda: nursery.state != "importing")
        assert nursery.state == "warm", nursery.problem

        before = len(os.listdir("/proc/self/fd"))
        for number in range(STARTS):
            told.clear()
            begin = time.thread_time()
            executor.spawn(spec, environment(spec))
            longest[0] = max(longest[0], time.thread_time() - begin)
            if number % 5 == 4:  # before it is born
                executor.kill(spec.group)
                await until(lambda: len(told) == 1)
                assert told == [("was killed before it was born", 0)]
                continue
            await until(lambda: len(told) == 1)
            ((_, pid),) = told
            assert psutil.Process(pid).ppid() == os.getpid()
            executor.kill(spec.group)
            await until(lambda: len(told) == 2)
            assert told[1] == ("was killed by SIGKILL", pid)
        assert executor.processes == {}
        assert len(os.listdir("/proc/self/fd")) == before

        def left() -> list[psutil.Process]:
            executor.reap_strays()
            return [child for child in children() if child.pid != nursery.child.pid]

        await until(lambda: not left())  # those who were forked and not wanted any more
        executor.close()
        await until(lambda: not left())  # and who was being forked as the nursery was ended
        assert children() == []
        assert len(os.listdir("/proc/self/fd")) < before

    asyncio.run(asyncio.wait_for(story(), 120))
    print(
        f"\n  {STARTS} starts, of which the longest took {longest[0] * 1e3:.1f} ms of the event loop's CPU time",
        end="",
    )
    assert longest[0] < 0.02


def test_a_nursery_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nurseries, "IMPORTS", 0.05)
    monkeypatch.setattr(nurseries, "BIRTH", 0.05)

    async def story() -> None:
        pids: list[int] = []
        spec = spec_of(tmp_path)
        nursery = Nursery()
        nursery.start("cpu")
        executor = LocalExecutor(
            lambda *rank: pids.append(rank[-1]),
            lambda *gone: None,
            lambda *heard: None,
            ("sleep", "60"),
            nursery,
        )
        psutil.Process(nursery.child.pid).suspend()
        executor.spawn(spec, environment(spec))
        assert pids == []
        await until(lambda: pids)
        rank = psutil.Process(pids[0])
        await until(rank.cmdline)  # it has none for a moment, while the kernel makes it the program
        assert rank.cmdline() == ["sleep", "60"]
        await until(lambda: nursery.state == "ended")
        assert nursery.problem == "It did not fork a rank in time"
        executor.close()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_daemon_lives_without_a_nursery_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async def story() -> None:
        before = len(os.listdir("/proc/self/fd"))
        nursery = Nursery()
        with monkeypatch.context() as no_processes_left:
            no_processes_left.setattr(nurseries.subprocess, "Popen", full)
            nursery.start("cpu")
        assert len(os.listdir("/proc/self/fd")) == before
        status = nursery.status()
        assert (status.state, status.pid) == ("ended", 0)
        assert status.problem == "It could not be started: Resource temporarily unavailable"
        spec = spec_of(tmp_path)
        assert nursery.ask(spec, environment(spec), []) is None
        nursery.close()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_nursery_that_is_given_up_takes_nobody_though_it_cannot_be_killed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], list[psutil.Process]]
) -> None:
    async def story() -> None:
        nursery = Nursery()
        nursery.start("cpu")
        with monkeypatch.context() as stuck:
            stuck.setattr(Child, "kill", lambda child: None)  # as one that waits for a disk in the kernel
            nursery.give_up("It did not fork a rank in time")
            assert nursery.state == "ended"
            spec = spec_of(tmp_path)
            assert nursery.ask(spec, environment(spec), ()) is None
        nursery.close()
        assert children() == []

    asyncio.run(asyncio.wait_for(story(), 60))
