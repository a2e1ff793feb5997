"""One model on several groups, for many clients: everybody is served, alike, and a replica's death costs a moment."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from bench.dispatch.swarm import jain, swarm
from tests.live.conftest import Serve
from xditd.client import Client
from xditd.protocol.messages import PlanRequest, Queued, Rebound

X = torch.zeros(1, 16, 4, 4)
FOUR = {"devices.cpu_ranks": 4, "devices.threads": 1, "arena.first_bytes": "64KiB"}


@pytest.mark.parametrize(
    ("clients", "runs", "steps", "fair"),
    [(20, 5, 3, 0.9), pytest.param(100, 20, 5, 0.95, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
)
def test_many_clients_on_four_replicas_are_all_served_and_alike(
    serve: Serve, clients: int, runs: int, steps: int, fair: float
) -> None:
    service = serve(**FOUR, **{"debug.rank_options": {"turn_seconds": "0.005"}})
    plan = PlanRequest(replicas=4, scheduling="least_loaded")
    with service.client() as client:
        assert len(client.load("echo/echo", plan).groups) == 4
        result = swarm(service.endpoint, clients, runs, steps, plan)
        assert result.wrong == []
        assert sum(result.groups.values()) == clients * runs
        assert len(result.groups) == 4
        fairness = jain([runs / seconds for seconds in result.seconds])
        print(
            f"\n  {clients} clients × {runs} runs × {steps} steps in {result.makespan:.1f} s, by replica "
            f"{sorted(result.groups.values())}, Jain's fairness {fairness:.4f}",
            end="",
        )
        assert fairness >= fair
        status = client.status()
        assert status.runs == ()
        assert [group.generation for group in status.groups] == [1, 1, 1, 1]


def test_a_run_goes_on_in_another_replica_while_its_own_starts_again(serve: Serve) -> None:
    service = serve(**FOUR)
    plan = PlanRequest(replicas=2, devices=("0-3",), ring=2)
    events: list[object] = []
    with service.client() as client:
        loaded = client.load("echo/echo", plan)
        with client.open_run("echo/echo", plan, on_event=events.append) as run:
            run.put_conditioning("c", {"context": X})
            assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
            other = next(group for group in loaded.groups if group != run.group)
            group = next(group for group in client.status().groups if group.group == run.group)
            os.kill(group.ranks[1].pid, signal.SIGSTOP)  # the step is under way when the rank dies
            killer = threading.Timer(0.2, os.kill, (group.ranks[0].pid, signal.SIGKILL))
            killer.start()
            for _ in range(400):
                assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
                if not killer.is_alive():
                    break
            killer.join()
            sigmas = [1 - i / 100 for i in range(101)]
            assert torch.equal(run.sample(X, sigmas, "c"), X)
            mine = next(one for one in client.status().runs if one.run == run.id)
            assert mine.group == other
        rebounds = [event for event in events if isinstance(event, Rebound)]
        assert all(event.group == other for event in rebounds)
        again = client.load("echo/echo", plan)
        assert len(again.groups) == 2
        assert sorted(group.generation for group in client.status().groups) == [1, 2]


def test_who_finds_no_place_hears_its_position_and_is_let_in(serve: Serve) -> None:
    service = serve(**FOUR, **{"limits.runs_per_group": 1})
    one = PlanRequest(devices=("0",))
    heard = threading.Event()
    positions: list[int] = []
    opened: list[str] = []

    def wait_in_line() -> None:
        def hear(event: object) -> None:
            if isinstance(event, Queued):
                positions.append(event.position)
                heard.set()

        with Client(service.endpoint) as other, other.open_run("echo/echo", one, on_event=hear) as run:
            opened.append(run.group)

    with service.client() as client:
        client.load("echo/echo", one)
        with client.open_run("echo/echo", one) as first:
            thread = threading.Thread(target=wait_in_line)
            thread.start()
            assert heard.wait(30)
            assert opened == []
        thread.join(30)
        assert positions[0] == 0
        assert opened == [first.group]


def test_replicas_can_be_there_from_the_start(serve: Serve) -> None:
    service = serve(**FOUR, **{"models.preload": [{"model": "echo/echo", "replicas": 4}]})
    with service.client() as client:
        assert client.load("echo/echo", PlanRequest(replicas=4)).groups == ("g1", "g2", "g3", "g4")
        assert [group.plan.devices for group in client.status().groups] == [(f"cpu:{i}",) for i in range(4)]
