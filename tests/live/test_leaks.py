"""Nothing adds up: not the clients that are killed, not the ranks that are killed, not the steps of a long life.

Each story has a short form for `make test` and a long one for `make soak`; the figures are printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.live.conftest import Serve
from tests.live.service import Service, wait_for
from xditd.client import Client
from xditd.protocol.messages import PlanRequest

ONE, TWO = PlanRequest(devices=("0",)), PlanRequest(ring=2)
X = torch.randn(1, 16, 32, 32)
GROWTH = 8 << 20
"""Bytes that the daemon and its ranks may grow by: allocators keep some."""

Say = Callable[[str], None]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def print_through(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end="")

    return print_through


@dataclass(frozen=True)
class Held:
    """What a daemon and its ranks hold."""

    daemon_descriptors: int
    rank_descriptors: int
    arena_bytes: int
    slots: int  # runs and arenas that status lists

    @classmethod
    def by(cls, service: Service, looker: Client) -> Held:
        status = looker.status()
        ranks = sum(rank.num_fds() for rank in service.ranks())
        return cls(service.descriptors(), ranks, status.arena_bytes, len(status.runs) + len(status.arenas))


def nobody(looker: Client) -> bool:
    status = looker.status()
    return not status.runs and not status.arenas


def kill_clients(serve: Serve, rounds: int, say: Say) -> None:
    service = serve(**{"debug.rank_options": {"turn_seconds": "0.002"}})
    with service.client(shared_memory=False) as looker:

        def kill_one() -> None:
            victim = subprocess.Popen(
                [sys.executable, "-m", "tests.live.victim", service.endpoint],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert victim.stdout is not None
            assert victim.stdout.readline() == "1\n"
            victim.kill()
            victim.wait()
            victim.stdout.close()
            wait_for(lambda: nobody(looker), "the client to be forgotten")

        kill_one()  # what is made once is made
        before, memory = Held.by(service, looker), service.rss()
        for _ in range(rounds):
            kill_one()
        wait_for(lambda: Held.by(service, looker) == before, f"no more to be held than before, {before}", 10)
        grown = service.rss() - memory
        say(
            f"{rounds} clients killed in mid-run: {before} before and after, {grown / 2**20:+.1f} MiB of memory"
        )
        assert grown < GROWTH
        assert looker.status().groups[0].generation == 1  # its ranks took no harm


def kill_ranks(serve: Serve, rounds: int, say: Say) -> None:
    service = serve(**{"restart.limit": 1000, "restart.backoff": 0.001, "restart.window": 0.2})
    sigmas = [1 - i / 20 for i in range(20)] + [0.0]
    with service.client() as client, client.open_run("echo/echo", TWO) as run:
        run.put_conditioning("c", {"context": X})

        def kill_one(which: int) -> None:
            generation = client.status().groups[0].generation
            victim = client.status().groups[0].ranks[which % 2].pid
            if which % 3 == 2:  # while nothing is under way
                os.kill(victim, signal.SIGKILL)
            killed = [victim]

            def kill_in_the_middle(step: int, *rest: object) -> None:
                if step == 5 and which % 3 != 2 and killed:
                    os.kill(killed.pop(), signal.SIGKILL)

            assert torch.equal(run.sample(X, sigmas, "c", callback=kill_in_the_middle), X)
            wait_for(lambda: client.status().groups[0].generation == generation + 1, "the next generation")
            wait_for(lambda: client.status().groups[0].state == "ready", "it to be ready")

        kill_one(0)
        before, memory = Held.by(service, client), service.rss()
        for which in range(rounds):
            kill_one(which)
        wait_for(lambda: Held.by(service, client) == before, f"no more to be held than before, {before}", 10)
        grown = service.rss() - memory
        say(f"{rounds} ranks killed: every result right, {before} before and after, {grown / 2**20:+.1f} MiB")
        assert grown < GROWTH


def live_long(serve: Serve, runs: int, steps: int, say: Say) -> None:
    service = serve()
    with service.client() as client:

        def one_run() -> None:
            with client.open_run("echo/echo", ONE) as run:
                run.put_conditioning("c", {"context": X})
                for _ in range(steps):
                    (prediction,) = run.denoise([(X, 1.0, "c")])
                assert torch.equal(prediction, X)

        one_run()
        before, memory = Held.by(service, client), service.rss()
        for _ in range(runs):
            one_run()
        grown = service.rss() - memory
        say(f"{runs} runs of {steps} steps: {before} before and after, {grown / 2**20:+.1f} MiB of memory")
        assert Held.by(service, client) == before
        assert grown < GROWTH


def test_killed_clients_leave_nothing_behind(serve: Serve, say: Say) -> None:
    kill_clients(serve, 5, say)


def test_killed_ranks_leave_nothing_behind(serve: Serve, say: Say) -> None:
    kill_ranks(serve, 3, say)


def test_a_long_life_leaves_nothing_behind(serve: Serve, say: Say) -> None:
    live_long(serve, 5, 100, say)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_killed_clients_leave_nothing_behind(serve: Serve, say: Say) -> None:
    kill_clients(serve, 200, say)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_100_killed_ranks_leave_nothing_behind(serve: Serve, say: Say) -> None:
    kill_ranks(serve, 100, say)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_100_000_steps_leave_nothing_behind(serve: Serve, say: Say) -> None:
    live_long(serve, 100, 1000, say)
