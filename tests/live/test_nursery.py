"""Ranks that are forked: they start fast, are the daemon's children as any are, and nothing depends on the nursery."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from tests.live.conftest import Serve
from tests.live.service import Service, serving, wait_for
from xditd.cli.doctor.daemon import judge_nursery
from xditd.client import Client
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

FLUX = "diffusion_models/flux.safetensors"
CONDITIONING = {"context": torch.ones(1, 8, 256), "pooled": torch.ones(1, 64)}
BOTH = PlanRequest(ulysses=2)


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def pids(client: Client) -> list[int]:
    return [rank.pid for group in client.status().groups for rank in group.ranks]


def held(pid: int) -> set[str]:
    """What a process's descriptors are; a pipe has one name at both ends, the two sockets of a pair have two."""
    targets = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            targets.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:  # closed while we look
            continue
    return {target for target in targets if target.startswith(("socket:", "pipe:"))}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    folders = {
        "nursery": True,
        "models.folders": {kind: [str(models / kind)] for kind in ("diffusion_models", "vae")},
    }
    with serving(tmp_path_factory.mktemp("nursery"), **folders) as service, service.client() as client:
        client.load(FLUX, BOTH)
        wait_for(lambda: client.status().nursery.state == "warm", "the nursery to be warm")
        yield service


def test_a_killed_rank_costs_its_group_less_than_a_second(service: Service) -> None:
    with service.client() as client, client.open_run(FLUX, BOTH):
        before = pids(client)
        os.kill(before[1], signal.SIGKILL)
        wait_for(
            lambda: [(g.generation, g.state) for g in client.status().groups] == [(2, "ready")],
            "the group to be back",
        )
        after = pids(client)
        assert set(before).isdisjoint(after)
        spent = [cpu_seconds(pid) for pid in after]
        print(f"\n  a group of two came back, its ranks took {max(spent):.2f} s of CPU time at most", end="")
        assert max(spent) < 1
        assert [psutil.Process(pid).ppid() for pid in after] == [service.process.pid] * 2
        assert [psutil.Process(pid).name() for pid in after] == ["xditd-rank"] * 2
        assert {psutil.Process(pid).num_threads() > 1 for pid in after} == {True}  # gloo's, after the fork
        assert service.nursery().num_threads() == 1
    assert "Rank 1 was killed by SIGKILL." in service.said()


def test_a_rank_holds_its_own_descriptors_and_no_others(service: Service) -> None:
    with service.client() as client:
        first, second = pids(client)
        daemon, nursery = held(service.process.pid), held(service.nursery().pid)
        assert len(nursery) == 2  # its socket and its output
        for pid, other in ((first, second), (second, first)):
            own = held(pid)
            assert own.isdisjoint(nursery)
            assert own.isdisjoint(held(other))
            (output,) = own & daemon
            assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2") == output
        assert os.readlink(f"/proc/{first}/fd/0") == os.devnull


def test_what_forked_ranks_write_reaches_the_log(serve: Serve) -> None:
    service = serve(
        **{"debug.rank_options": {"exit_at_order": "1"}, "restart.limit": 1, "compute.fallback": "never"}
    )
    with service.client() as client, client.open_run(FLUX) as run:
        wait_for(lambda: any(rank.name() == "xditd-rank" for rank in service.ranks()), "a forked rank")
        run.put_conditioning("c", CONDITIONING, {"guidance": 3.5})
        with pytest.raises(XditError) as lost:
            run.denoise([(torch.ones(1, 16, 8, 8), 0.5, "c")])
    assert lost.value.code == "model_failed"
    assert "exited with code 0." in service.said()


def test_groups_start_without_a_nursery_that_was_killed_and_it_is_said(serve: Serve) -> None:
    service = serve()
    service.nursery().kill()
    with service.client() as client:
        status = wait_for(
            lambda: (status := client.status()).nursery.state == "ended" and status, "the daemon to notice"
        )
        assert status.nursery.problem == "It was killed by SIGKILL"
        check = judge_nursery(status.nursery)
        assert check.found == "slow: the nursery ended. It was killed by SIGKILL."
        client.load(FLUX)
        assert "xditd.rank.nursery" not in " ".join(service.ranks()[0].cmdline())
    assert "The nursery has ended: It was killed by SIGKILL. Ranks import for themselves" in service.said()


def test_a_rank_that_waits_for_the_nursery_is_started_when_that_dies(serve: Serve) -> None:
    service = serve(nursery=True)
    nursery = service.nursery()
    nursery.suspend()  # it answers nobody
    with service.client() as client, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(client.load, FLUX)
        wait_for(lambda: client.status().groups, "the group to be asked for")
        assert service.ranks() == []
        assert not loading.done()
        nursery.kill()
        assert loading.result(100).plan.devices == ("cpu:0", "cpu:1")
    assert (
        "The nursery did not fork this rank: it is started as a program. (group g1, rank 0)" in service.said()
    )


def test_a_killed_daemon_leaves_neither_nursery_nor_ranks(service: Service) -> None:
    everybody = [service.nursery(), *service.ranks()]
    assert len(everybody) == 3
    service.kill()
    _, alive = psutil.wait_procs(everybody, 10)
    assert alive == []
