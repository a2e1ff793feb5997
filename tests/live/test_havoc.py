"""Ranks are killed and stopped, runs cancelled, models unloaded, freed, driven out and put to sleep, under load: every
run ends exactly once, and no slot, group or descriptor is lost. At the end the daemon is drained with everybody at work."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from tests.live.conftest import Serve
from tests.live.havoc import MODELS, Chaos, Clients, Witness
from tests.live.service import Service, wait_for
from xditd.client import Client

SETTINGS = {
    "devices.cpu_ranks": 4,
    "devices.threads": 1,
    "devices.activation_memory": "100MiB",
    "devices.cpu_memory": "650MiB",  # two replicas of two ranks and one of the others; all would take 700
    "arena.first_bytes": "64KiB",
    "models.sleep_after": "0.5s",
    "models.patience": "0.5s",
    "deadlines.turn": "2s",
    "deadlines.first_turn": "2s",
    "deadlines.load": "20s",  # on a machine that is busy with others' things
    "deadlines.stop": "1s",
    "restart.limit": 1000,
    "restart.window": "2s",  # or a model that is killed every few seconds is soon tried once in a minute
    "restart.backoff": "0.05s",
    "debug.rank_command": [sys.executable, "-m", "bench.dispatch.rank"],
}
TURNS = "cpu:0=0.004,cpu:1=0.004,cpu:2=0.004,cpu:3=0.012"
"""Seconds that a turn takes: the rank program sleeps for so long."""


def idle(looker: Client) -> bool:
    """Nobody has anything: no run, no group, no shared memory but the looker's and the witness's."""
    status = looker.status()
    return not status.runs and not status.groups and len(status.arenas) == 2 and status.clients == 2


def held(service: Service, looker: Client) -> tuple[int, int, int]:
    """Descriptors of the daemon, bytes of its arenas, and its processes."""
    return service.descriptors(), looker.status().arena_bytes, len(service.ranks())


def warmed(service: Service, looker: Client) -> None:
    """Every model has been there once, and is gone: what is made once is made."""
    with service.client() as client:
        for ref, plan in MODELS:
            with client.open_run(ref, plan):
                pass
    looker.free_memory()
    wait_for(lambda: idle(looker), "the models to be gone")


@pytest.mark.parametrize(
    ("clients", "seconds", "rate"),
    [(8, 5.0, 4.0), pytest.param(20, 180.0, 3.0, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
)
def test_whatever_happens_under_load_every_run_ends_once_and_nothing_is_lost(
    serve: Serve, clients: int, seconds: float, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("XDITD_HAVOC_SEED", "7"))
    service = serve(environment={"XDITD_BENCH_TURNS": TURNS}, **SETTINGS)
    witness = Witness(service)
    with service.client(name="looker", timeout=60) as looker:
        warmed(service, looker)
        before, memory = held(service, looker), service.rss()
        crowd, chaos = Clients(service, clients, seed), Chaos(service, rate, seed)
        crowd.start()
        chaos.start()
        threading.Event().wait(seconds)
        chaos.end()
        looker.drain(timeout=120)  # with everybody at work
        assert looker.status().runs == ()
        crowd.join(60)
        result = crowd.crowd
        assert result.wrong == []
        assert chaos.wrong == []

        looker.free_memory()
        wait_for(lambda: idle(looker), "everything to be given back")
        wait_for(lambda: held(service, looker) == before, f"no more to be held than before, {before}", 10)
        wait_for(lambda: len(witness.runs("run_ended")) == len(witness.runs("run_opened")), "the last events")
        opened, ended = witness.runs("run_opened"), witness.runs("run_ended")
        numbers = [happened.number for happened in witness.heard]
        grown = service.rss() - memory
    witness.close()
    with capsys.disabled():
        print(
            f"\n  {clients} clients for {seconds:g} s, seed {seed}: {len(opened)} runs, {result.steps} answers, ended "
            f"{dict(result.ends.most_common())}, refused {dict(result.refusals.most_common())}; "
            f"done to them {dict(chaos.done.most_common())}; groups started {witness.count('group_starting')}, failed "
            f"{witness.count('group_failed')}, slept {witness.count('group_asleep')}, woken "
            f"{witness.count('group_waking')}; {before} before and after, {grown / 2**20:+.1f} MiB",
            end="",
        )
    assert numbers == list(range(1, len(numbers) + 1)), "the witness missed something"
    assert set(opened.values()) == set(ended.values()) == {1}
    assert opened == ended
    told = sum(result.ends.values()) + result.refusals["run_cancelled"] + result.refusals["rank_lost"]
    assert told == len(opened) - len(MODELS), "a client was not told how its run ended"
    assert result.ends["closed"] > 0
    assert chaos.done["kill"] > 0
    assert service.stop() == 0
