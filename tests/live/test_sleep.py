"""Models that nobody uses sleep in the host's memory: real ranks, whose memory falls and comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.live.conftest import Serve
from tests.live.service import wait_for
from xditd.client import Client
from xditd.models.making import make_flux
from xditd.protocol.figures import GroupStatus
from xditd.protocol.messages import PlanRequest

SHAPE = {"heads": 6, "head_dim": 64, "context_width": 64, "pooled_width": 32}
MODEL = "diffusion_models/flux.safetensors"
TWO = PlanRequest(ulysses=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sleep")
    make_flux(folder / "flux.safetensors", **SHAPE)  # in bfloat16, which ranks on a CPU make float32 of
    return folder


def group(client: Client) -> GroupStatus:
    (group,) = client.status().groups
    return group


def rss(group: GroupStatus) -> int:
    return sum(rank.rss or 0 for rank in group.ranks)


def sample(client: Client) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with client.open_run(MODEL, TWO) as run:
        context = torch.randn(1, 20, SHAPE["context_width"], generator=generator)
        pooled = torch.randn(1, SHAPE["pooled_width"], generator=generator)
        run.put_conditioning("c", {"context": context, "pooled": pooled})
        return run.sample(torch.randn(1, 16, 8, 8, generator=generator), [1.0, 0.5, 0.0], "c").clone()


def test_a_model_sleeps_wakes_for_the_next_run_and_its_picture_is_the_same(
    serve: Serve, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = serve(**{"models.folders": {"diffusion_models": [str(folder)]}, "models.sleep_after": "1s"})
    weights = 2 * 2 * (folder / "flux.safetensors").stat().st_size  # of two ranks
    with service.client() as client:
        before = sample(client)
        awake = group(client)
        wait_for(lambda: group(client).state == "asleep", "the model to sleep")
        asleep = group(client)
        assert {rank.phase for rank in asleep.ranks} == {"asleep"}
        phases: list[str] = []
        client.load(MODEL, TWO, on_event=lambda event: phases.append(event.phase))
        assert "waking" in phases
        assert torch.equal(sample(client), before)
        again = group(client)
        assert (again.generation, [r.pid for r in again.ranks]) == (1, [r.pid for r in awake.ranks])
        slept = client.sleep(MODEL)  # at once, without waiting for the second
        assert (slept.groups, group(client).state) == ((again.group,), "asleep")
        assert torch.equal(sample(client), before)
        heard: list[str] = []
        client.watch(lambda happened: heard.append(happened.event), after=0, count=10)
    told = [event for event in heard if event.startswith("group")]
    assert told[:6] == [f"group_{s}" for s in ("starting", "ready", "dozing", "asleep", "waking", "ready")]
    with capsys.disabled():
        print(
            f"\n  two ranks: {rss(awake) >> 20} MiB awake, {rss(asleep) >> 20} asleep; weights {weights >> 20}"
        )
    assert rss(awake) - rss(asleep) > 0.8 * weights
