"""A sampling through a pipeline of stages, from a client: exact where it is all warm-up, told of step by step, cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.live.conftest import FLUX
from tests.live.service import serving
from tests.rank.families import normal
from tests.rank.reference import Reference, error, euler
from xditd.client import Client, Run
from xditd.models.making import flux_facts
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

MODEL = "diffusion_models/flux.safetensors"
PLAN = PlanRequest(strategy="PipeFusion", devices=("0", "1"))
SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]
NOISE = normal(1, 16, 18, 22)
GIVEN = {
    "context": normal(1, 31, FLUX["context_width"], seed=1),
    "pooled": normal(1, FLUX["pooled_width"], seed=2),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Client]:
    settings = {
        "devices.cpu_ranks": 2,
        "models.folders": {"diffusion_models": [str(models / "diffusion_models")]},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service, service.client() as client:
        yield client


@pytest.fixture
def run(client: Client) -> Iterator[Run]:
    with client.open_run(MODEL, PLAN) as run:
        run.put_conditioning("prompt", GIVEN, {"guidance": 3.5})
        yield run


def test_all_of_it_warm_up_is_the_picture_of_one_process(
    run: Run, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Reference(models / "diffusion_models" / "flux.safetensors", flux_facts(**FLUX))
    shown: list[tuple[int, bool]] = []

    def callback(step: int, total: int, sigma: float, x0: torch.Tensor | None) -> None:
        assert total == 4
        shown.append((step, x0 is not None))

    latent = run.sample(NOISE, SIGMAS, "prompt", warmup=4, callback=callback)
    expected = euler(lambda x, t: reference.predict(x, t, **GIVEN, guidance=3.5), SIGMAS, NOISE)
    with capsys.disabled():
        print(f"\n  through the daemon, pipefusion 2, warm-up 4 of 4: {error(latent, expected):.1e}", end="")
    assert error(latent, expected) < 1e-5
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert shown[0] == (1, False)
    assert shown[-1] == (4, True)
    assert "approximate" in run.plan.reason


def test_a_step_by_itself_is_refused_with_what_would_work(run: Run) -> None:
    with pytest.raises(XditError, match=r"overlap.*`sample`.*USP") as refused:
        run.denoise([(NOISE, 0.7, "prompt")])
    assert refused.value.code == "bad_plan"
    with pytest.raises(XditError, match="euler, dpmpp_2m, ddim") as refused:
        run.sample(NOISE, SIGMAS, "prompt", sampler="heun")
    assert refused.value.code == "bad_value"


def test_a_cancel_ends_it_in_mid_run_and_the_stages_serve_on(client: Client, run: Run) -> None:
    before = {rank.pid for group in client.status().groups for rank in group.ranks}
    whole = run.sample(NOISE, SIGMAS, "prompt")
    heard: list[int] = []

    def callback(step: int, total: int, sigma: float, x0: torch.Tensor | None) -> None:
        heard.append(step)
        if step == 3:
            run.cancel()

    many = torch.linspace(1, 0, 1001).tolist()
    with pytest.raises(XditError) as ended:
        run.sample(NOISE, many, "prompt", callback=callback, previews=False)
    assert ended.value.code == "run_cancelled"
    assert len(heard) < 100, "of a thousand steps"
    with client.open_run(MODEL, PLAN) as again:
        again.put_conditioning("prompt", GIVEN, {"guidance": 3.5})
        assert torch.equal(again.sample(NOISE, SIGMAS, "prompt"), whole)
    assert {rank.pid for group in client.status().groups for rank in group.ranks} == before
