"""What a real daemon tells of what happens, to a program and on a command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from tests.live.conftest import Serve
from tests.live.service import wait_for
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Happened, PlanRequest

X = torch.zeros(1, 16, 4, 4)
ONE = PlanRequest(devices=("0",))


class Watcher:
    """A client that hears everything from the daemon's beginning, in a thread."""

    def __init__(self, service) -> None:
        self.heard: list[Happened] = []
        self.last: int | None = None  # what the daemon answered, where it did
        self.client = service.client(name="watcher", shared_memory=False)
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        with contextlib.suppress(XditError):  # the daemon was killed, or the client closed
            self.last = self.client.watch(self.heard.append, after=0)

    def wait(self, event: str, times: int = 1) -> Happened:
        return wait_for(lambda: self.of(event)[times - 1 :], event)[0]

    def of(self, event: str) -> list[Happened]:
        return [happened for happened in self.heard if happened.event == event]

    def names(self, thing: str) -> list[str]:
        return [happened.event for happened in self.heard if happened.event.startswith(thing)]

    def close(self) -> None:
        self.client.close()
        self.thread.join(30)


@pytest.fixture
def service(serve: Serve):
    return serve()


@pytest.fixture
def watcher(service):
    watcher = Watcher(service)
    yield watcher
    watcher.close()


def test_the_life_of_a_group_and_its_runs_in_order(service, watcher):
    with service.client(name="a program") as client:
        with client.open_run("echo/echo", ONE, label="a secret fox") as run:
            run.put_conditioning("a secret fox", {"context": X})
            run.denoise([(X, (1.0,), "a secret fox")])
        cancelled = client.open_run("echo/echo", ONE)
        client.cancel(cancelled.id)
        client.unload("echo/echo")
        watcher.wait("group_gone")
    watcher.wait("client_gone")
    assert watcher.names("group") == ["group_starting", "group_ready", "group_leaving", "group_gone"]
    closed, ended = watcher.of("run_ended")
    assert (closed.run, closed.code, closed.client) == (1, "", "a program")
    assert (ended.run, ended.code, ended.message) == (2, "run_cancelled", "Run 2 was cancelled.")
    assert watcher.of("run_opened")[0].model.name == "echo"
    assert [h.number for h in watcher.heard] == list(range(1, len(watcher.heard) + 1))
    assert "fox" not in repr(watcher.heard), "labels and keys are the client's own words"


def test_a_killed_rank_is_a_failure_with_its_reason_and_the_next_generation(service, watcher):
    with service.client() as client, client.open_run("echo/echo", ONE) as run:
        os.kill(client.status().groups[0].ranks[0].pid, signal.SIGKILL)
        run.put_conditioning("c", {"context": X})
        run.denoise([(X, (1.0,), "c")])
        watcher.wait("group_ready", times=2)
    lives = [(h.event.removeprefix("group_"), h.generation) for h in watcher.heard if h.group]
    assert lives == [("starting", 1), ("ready", 1), ("failed", 1), ("gone", 1), ("starting", 2), ("ready", 2)]
    failed = watcher.wait("group_failed")
    assert failed.code == "rank_lost"
    assert "SIGKILL" in failed.message


def test_who_says_goodbye_is_no_client_any_more_and_its_runs_end(service, watcher):
    """Without shared memory there is no end of file: before there was a goodbye, each `xditctl` was a client for minutes."""
    with service.client(name="looker") as looker:
        with service.client(name="a program", shared_memory=False) as client:
            run = client.open_run("echo/echo", ONE)
            run.put_conditioning("c", {"context": X})
            assert looker.status().clients == 3
        command = [sys.executable, "-m", "xditd.cli.xditctl", "status", "--endpoint", service.endpoint]
        for _ in range(2):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        watcher.wait("client_gone", times=3)
        assert looker.status().clients == 2, "the looker and the watcher"
        assert looker.status().runs == ()
        (ended,) = watcher.of("run_ended")
        assert (ended.run, ended.code) == (run.id, "run_cancelled")


def test_draining_is_told_and_a_daemon_that_stops_ends_the_watch(service, watcher):
    with service.client() as client:
        client.drain()
    watcher.wait("draining")
    assert service.stop() == 0
    watcher.thread.join(30)
    assert watcher.last == watcher.heard[-1].number, "it was answered, and not hung up on"
    assert [h.event for h in watcher.heard if "_" not in h.event] == ["serving", "draining", "stopping"]


def test_events_on_the_command_line_are_lines_of_json(service):
    with service.client(name="a [red] program") as client:
        client.load("echo/echo", ONE)
    command = [sys.executable, "-m", "xditd.cli.xditctl", "events", "--kept", "--endpoint", service.endpoint]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as following:
        told = [json.loads(following.stdout.readline()) for _ in range(4)]
        assert [one["event"] for one in told] == [
            "serving",
            "client_connected",
            "group_starting",
            "group_ready",
        ]
        assert told[1]["client"] == "a [red] program"
        assert set(told[0]) == {"number", "time", "event"}
        service.stop()
        *_, last = following.stdout.read().splitlines()
        assert following.wait(30) == 3
    assert json.loads(last)["event"] in ("stopping", "group_leaving")


def test_events_for_people(service):
    with service.client(name="a [red] program") as client:
        client.load("echo/echo", ONE)
    command = [sys.executable, "-m", "xditd.cli.xditctl", "events", "--kept", "--count=4", "--endpoint"]
    shown = subprocess.run([*command, service.endpoint], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    lines = [line[9:] for line in shown.stdout.splitlines()]  # without the time
    assert lines[0] == "✅ daemon serving"
    assert lines[1] == "   client connected · a [red] program"
    assert lines[3] == "✅ group g1 ready · echo/echo"
    assert "\x1b" not in shown.stdout


def test_a_reader_that_stands_still_costs_the_daemon_nothing_that_grows(service):
    """It asks for events and reads none; the daemon goes on, and so does everybody else."""
    with service.client(shared_memory=False) as slow:
        hold = threading.Event()
        thread = threading.Thread(target=lambda: slow.watch(lambda event: hold.wait(60), count=3, after=0))
        thread.start()
        with service.client() as client:
            client.load("echo/echo", ONE)
            before = service.rss()
            for _ in range(400):
                with client.open_run("echo/echo", ONE):
                    pass
            assert service.rss() - before < 16 << 20
            assert client.status().state == "serving"
        hold.set()
        thread.join(30)
        assert not thread.is_alive()
