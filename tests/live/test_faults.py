"""Any process may be killed at any time: nothing leaks, nothing hangs, and what can go on goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.live.conftest import FLUX, Serve
from tests.live.service import wait_for
from xditd.client import Client
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest, Rebound

X = torch.zeros(1, 16, 4, 4)
TWO, ONE = PlanRequest(ring=2), PlanRequest(devices=("0",))
LONG = [1 - i / 400 for i in range(400)] + [0.0]


def opened(client: Client, plan: PlanRequest = TWO, **arguments):
    run = client.open_run("echo/echo", plan, **arguments)
    run.put_conditioning("c", {"context": X})
    return run


def pids(client: Client) -> list[int]:
    (group,) = client.status().groups
    return [rank.pid for rank in group.ranks]


def test_a_killed_rank_costs_a_moment_and_not_the_picture(serve: Serve):
    """Real ranks: one dies in the middle of a sampling loop; the loop begins anew from its noise, elsewhere."""
    service = serve()
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, 15, FLUX["context_width"], generator=generator)
    pooled = torch.randn(1, FLUX["pooled_width"], generator=generator)
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    events: list[object] = []
    with service.client() as client:
        run = client.open_run(
            "diffusion_models/flux.safetensors", PlanRequest(ulysses=2), on_event=events.append
        )
        run.put_conditioning("c", {"context": context, "pooled": pooled})
        undisturbed = run.sample(noise, sigmas, "c")
        victims, steps = pids(client), []

        def kill_in_the_middle(step, *rest):
            steps.append(step)
            if steps == [1, 2]:
                os.kill(victims[1], signal.SIGKILL)

        again = run.sample(noise, sigmas, "c", callback=kill_in_the_middle)
        assert torch.equal(again, undisturbed)
        assert steps[-5:] == [1, 2, 3, 4, 5]
        assert any(isinstance(event, Rebound) for event in events)
        (group,) = client.status().groups
        assert group.generation == 2
        assert not set(pids(client)) & set(victims)
        assert [file.name for file in service.folder.glob("ranks-*/*.store")] == ["g1.2.store"]


def test_a_killed_rank_is_noticed_within_50_ms(serve: Serve):
    service = serve()
    with service.client() as client, opened(client) as run:
        victim = pids(client)[1]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: "was killed by SIGKILL" in service.said(), "the daemon to notice")
        noticed = time.monotonic() - killed
        (prediction,) = run.denoise([(X, 1.0, "c")])  # its group is replaced while it waits
        assert torch.equal(prediction, X)
    assert noticed < 0.05


def test_a_hanging_rank_is_killed_at_its_deadline_and_the_step_asked_again(serve: Serve):
    service = serve(**{"deadlines.turn": 0.5, "deadlines.first_turn": 0.5})
    with service.client() as client, opened(client) as run:
        run.denoise([(X, 1.0, "c")])
        os.kill(pids(client)[0], signal.SIGSTOP)
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
        assert client.status().groups[0].generation == 2
    assert "a rank hangs" in service.said()


def test_a_rank_that_leaves_unasked_is_a_rank_that_crashed(serve: Serve):
    service = serve(**{"debug.rank_options": {"exit_at_order": "2"}, "restart.backoff": 0.1})
    with service.client() as client, opened(client) as run:
        run.denoise([(X, 1.0, "c")])
        with pytest.raises(XditError) as failed:  # as does the next generation, and so on
            run.sample(X, LONG, "c")
        assert failed.value.code == "rank_lost"
    assert "exited with code 0" in service.said()


def test_a_model_that_crashes_at_load_is_given_up_with_its_reason(serve: Serve):
    service = serve(**{"debug.rank_options": {"crash_at_load": "1"}, "restart.backoff": 0.01})
    with service.client() as client:
        with pytest.raises(XditError) as failed:
            client.load("echo/echo", TWO)
        assert failed.value.code == "model_failed"
        assert "SIGKILL" in failed.value.message
        with pytest.raises(XditError, match="failed 3 times"):
            client.open_run("echo/echo", TWO)
        assert client.status().groups == ()


def test_an_exception_in_a_turn_is_answered_and_its_group_replaced(serve: Serve):
    service = serve(**{"debug.rank_options": {"fail_at_order": "2", "only_rank": "0"}})
    with service.client() as client, opened(client) as run:
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
        with pytest.raises(XditError, match="A fault that a test asked for"):
            run.denoise([(X, 1.0, "c")])
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)  # the first turn of the next generation
        assert client.status().groups[0].generation == 2
    assert "Traceback" in service.said()


def test_the_only_rank_of_a_group_survives_an_exception(serve: Serve):
    service = serve(**{"debug.rank_options": {"oom_at_order": "2"}})
    with service.client() as client, opened(client, ONE) as run:
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
        with pytest.raises(XditError) as failed:
            run.denoise([(X, 1.0, "c")])
        assert failed.value.code == "out_of_memory"
        assert torch.equal(run.denoise([(X, 1.0, "c")])[0], X)
        assert client.status().groups[0].generation == 1


def test_no_rank_outlives_a_killed_daemon_and_the_next_one_takes_its_place(serve: Serve):
    service = serve()
    with service.client() as client:
        run = opened(client)
        ranks, epoch = pids(client), client.epoch
        service.kill()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks), "the ranks to be gone", 5)
        with pytest.raises(XditError) as lost:
            run.denoise([(X, 1.0, "c")])
        assert lost.value.code in ("daemon_lost", "run_lost")

        second = serve(folder=service.folder)  # on the socket that the first one left behind
        assert second.endpoint == service.endpoint
        assert client.status().groups == ()
        assert client.epoch != epoch
        with pytest.raises(XditError, match="run_lost"):
            run.denoise([(X, 1.0, "c")])
        with opened(client) as anew:
            assert torch.equal(anew.denoise([(X, 1.0, "c")])[0], X)


def test_a_second_daemon_refuses_and_the_first_serves_on(serve: Serve):
    service = serve()
    second = subprocess.run(
        [sys.executable, "-m", "xditd.daemon", f"--set=endpoint={service.endpoint}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 69
    assert f"pid {service.process.pid}" in second.stderr
    with service.client() as client:
        assert client.status().pid == service.process.pid
