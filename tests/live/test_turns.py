"""Runs of several clients on one group: they take turns, and a cancel ends one within a step."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from tests.live.conftest import Serve
from tests.live.service import wait_for
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

X = torch.zeros(1, 16, 4, 4)
ONE = PlanRequest(devices=("0",))
STEP = 0.05
LONG = [1 - i / 400 for i in range(400)] + [0.0]


@pytest.fixture
def service(serve: Serve):
    return serve(**{"debug.rank_options": {"turn_seconds": str(STEP)}})


def sample(client, sigmas, **arguments):
    with client.open_run("echo/echo", ONE) as run:
        run.put_conditioning("c", {"context": X})
        return run.sample(X, sigmas, "c", **arguments)


def test_two_clients_sample_on_one_group_in_turns(service):
    order = []

    def work(name):
        with service.client() as client:
            sample(client, [1, 0.8, 0.6, 0.4, 0.2, 0], callback=lambda *step: order.append(name))

    with service.client() as client:
        client.load("echo/echo", ONE)
    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a"] * 5 + ["b"] * 5
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes >= 5, order  # one after the other would be a single change


def test_an_interrupt_returns_at_once_and_the_next_run_works(service):
    interrupted = threading.Event()

    class Stop(Exception):
        pass

    def interrupt():
        if interrupted.is_set():
            raise Stop

    with service.client() as client:
        with pytest.raises(Stop):
            sample(client, LONG, callback=lambda *step: interrupted.set(), interrupt=interrupt)
        began = time.monotonic()
        assert torch.equal(sample(client, [1, 0]), X)
        assert time.monotonic() - began < 5  # not behind the 400 steps of the first
        assert client.status().runs == ()


def test_another_client_may_cancel_a_run(service):
    started = threading.Event()
    failures = []

    def work():
        with service.client() as client:
            try:
                sample(client, LONG, callback=lambda *step: started.set())
            except XditError as error:
                failures.append(error.code)

    thread = threading.Thread(target=work)
    thread.start()
    with service.client() as other:
        assert started.wait(30)
        (run,) = other.status().runs
        assert run.total == 400
        other.cancel(run.run)
        assert other.status().runs == ()
    thread.join(30)
    assert failures == ["run_cancelled"]


def test_a_stop_lets_the_request_under_way_finish_and_takes_nothing_new(service):
    started = threading.Event()
    results = []

    def work():
        with service.client() as client:
            results.append(
                sample(client, [1 - i / 20 for i in range(21)], callback=lambda *step: started.set())
            )

    thread = threading.Thread(target=work)
    with service.client() as other:
        thread.start()
        assert started.wait(30)
        service.process.terminate()
        wait_for(lambda: "Stopping" in service.said(), "the stop to begin")
        with pytest.raises(XditError) as refused:
            other.open_run("echo/echo", ONE)
        assert refused.value.code in ("draining", "daemon_lost")
        thread.join(30)
        assert torch.equal(results[0], X)
    assert service.process.wait(30) == 0
    left = {path.name for path in service.folder.iterdir()}
    assert left == {"log"}


def test_drain_waits_for_open_runs_and_then_stops(service):
    with service.client() as client, client.open_run("echo/echo", ONE) as run:
        done = threading.Event()

        def drain():
            with service.client() as other:
                other.drain(stop=True, timeout=30)
                done.set()

        thread = threading.Thread(target=drain)
        thread.start()
        wait_for(lambda: "Draining" in service.said(), "the drain to begin")
        assert not done.is_set()
        assert client.status().state == "draining"
        run.put_conditioning("c", {"context": X})
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
        run.close()
        assert done.wait(30)
        thread.join(30)
    assert service.process.wait(30) == 0
