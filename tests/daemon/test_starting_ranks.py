"""Ranks that cannot be started, for want of descriptors, processes or memory: their group fails, and nothing is left."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import zmq

from tests.daemon.world import World
from xditd.daemon.config import Config
from xditd.daemon.executor import LocalExecutor
from xditd.daemon.launch import environment, rank_specs
from xditd.daemon.ranks import Ranks
from xditd.protocol import messages as m
from xditd.protocol.orders import RankSpec


def no_descriptors() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def only(times: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which succeeds so many times and then finds no descriptors."""
    left = iter(range(times))
    return lambda *a, **k: call(*a, **k) if next(left, None) is not None else no_descriptors()


class Processes:
    """An executor without processes, which can start so many and no more. The killed are gone a moment later."""

    def __init__(self, gone: Callable[[str, int, int, int, str], None], room: int) -> None:
        self.gone = gone
        self.room = room
        self.living: list[tuple[str, int, int, int]] = []
        self.pids = 0

    def spawn(self, spec: RankSpec, environment: dict[str, str]) -> None:
        if len(self.living) == self.room:
            no_descriptors()
        self.pids += 1
        self.living.append((spec.group, spec.generation, spec.rank, self.pids))
        Path(spec.store.removeprefix("file://")).touch()

    def kill(self, group: str) -> None:
        for process in [process for process in self.living if process[0] == group]:
            self.living.remove(process)
            asyncio.get_running_loop().call_soon(self.gone, *process, "was killed by SIGKILL")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("room", [0, 1])
def test_a_group_whose_ranks_cannot_be_started_fails_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    async def story() -> None:
        context: zmq.Context = zmq.Context()
        ranks = Ranks(context, tmp_path, Config(), lambda peer: None)
        processes = Processes(ranks._gone, room)
        world = World()
        ranks.executor = processes
        ranks.dispatcher = world.core
        world.core.ranks = world.core.fleet.ranks = ranks

        run = world.open()
        world.core.fleet.load(b"ctl", m.Load(id=99, model=run.ref), run.found, run.keys, world.now)
        assert not any(isinstance(answer, m.Failed) for _, answer in world.answers)  # not in mid-decision
        for _ in range(3):
            await asyncio.sleep(0)
        for request in (run.reopen, 99):
            failed = world.end_of(request)
            assert failed.code == "load_failed"
            assert f"Rank {room} could not be started: Too many open files." in failed.message
        assert processes.living == []
        assert world.core.fleet.groups == {}  # all of its ranks are gone, the started and the others
        assert ranks._passed == {}

        processes.room = 2  # and when there is room again
        again = world.open()
        world.ready(world.core.fleet.groups["g2"])
        assert isinstance(world.end_of(again.reopen), m.RunOpened)
        ranks.close()
        context.destroy(0)

    with caplog.at_level(logging.ERROR):
        asyncio.run(story())
    assert "could not be started: Too many open files" in caplog.text
    assert [file.name for file in tmp_path.glob("*.store")] == ["g2.1.store"]  # nothing of the first one's


@pytest.mark.parametrize(
    ("call", "succeeds"),
    [
        ("socket.socketpair", 0),
        ("socket.socketpair", 1),
        ("os.pipe", 0),
        ("os.pipe", 1),  # within Popen
        ("subprocess.Popen", 0),
        ("os.pidfd_open", 0),
        ("asyncio.SelectorEventLoop.add_reader", 2),
    ],
)
def test_a_rank_that_cannot_be_started_leaves_no_descriptor_and_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, succeeds: int
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Sleep(subprocess.Popen):
        def __init__(self, command: object, **options: Any) -> None:
            super().__init__(["sleep", "60"], **options)
            started.append(self)

    async def story() -> None:
        world = World()
        world.open()
        spec = rank_specs(world.started[0], Config(), tmp_path)[0]
        executor = LocalExecutor(*[lambda *told: None] * 3)
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr("subprocess.Popen", Sleep)
            patch.setattr(call, only(succeeds, resolve_name(call)))
            with pytest.raises(OSError, match="Too many open files"):
                executor.spawn(spec, environment(spec))
        assert len(os.listdir("/proc/self/fd")) == before
        assert executor.processes == {}
        assert [popen.returncode for popen in started] in ([], [-signal.SIGKILL])

    asyncio.run(story())
