"""A model that is too large for the memory there is, and a batch that is: real ranks do it with less, and the result is true."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.live.conftest import FLUX
from tests.live.service import Service, serving
from tests.live.test_image import MODEL, SIGMAS, TOLERANCE, given, noise
from tests.rank.reference import Reference, error, euler
from xditd.models.making import flux_facts, make_flux
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

SHAPE = {**FLUX, "double_blocks": 4, "single_blocks": 4}
MARGIN = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_flux(folder / "flux.safetensors", **SHAPE, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> int:
    """Bytes of all weights."""
    return (folder / "flux.safetensors").stat().st_size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, folder: Path, whole: int) -> Iterator[Service]:
    """A daemon whose memory holds 0.7 of the model, and whose ranks have no memory for their first turn."""
    settings = {
        "models.folders": {"diffusion_models": [str(folder)]},
        "devices.activation_memory": MARGIN,
        "devices.cpu_memory": int(0.7 * whole) + MARGIN,
        "debug.rank_options": {"oom_at_order": "1"},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder / "flux.safetensors", flux_facts(**SHAPE))


def expected(reference: Reference, start: torch.Tensor, text: int) -> torch.Tensor:
    predict = partial(reference.predict, **given(text), guidance=3.5)
    return euler(predict, SIGMAS, start)


def test_what_has_no_room_runs_layer_by_layer_and_a_batch_item_by_item(
    small: Service, whole: int, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    start = torch.cat([noise(18, 22), -noise(18, 22)])
    with small.client() as client, client.open_run(MODEL) as run:
        assert run.plan.offload == "layerwise"
        assert "needs" in run.degraded
        run.put_conditioning("prompt", given(31), {"guidance": 3.5})
        latent = run.sample(start, SIGMAS, "prompt").clone()  # its first turn has no memory
        report = client.status()
        (group,) = report.groups
        (rank,) = group.ranks
        assert "one item after another" in report.runs[0].degraded
    apart = [error(latent[i : i + 1], expected(reference, start[i : i + 1], 31)) for i in range(2)]
    with capsys.disabled():
        print(
            f"\n  layerwise, item by item: {max(apart):.1e}; {rank.weights / whole:.0%} on the device", end=""
        )
    assert max(apart) < TOLERANCE
    assert rank.weights < 0.7 * whole
    assert rank.weights + rank.host_weights > whole * 0.99


@pytest.mark.parametrize(
    "plan", [PlanRequest(fallback="never"), PlanRequest(offload="model", fallback="never")]
)
def test_never_is_never(small: Service, plan: PlanRequest) -> None:
    with small.client() as client, pytest.raises(XditError) as refused:
        client.open_run(MODEL, plan)
    assert refused.value.code == "out_of_memory"


def test_the_planner_says_what_there_is_instead(small: Service) -> None:
    with small.client() as client:
        answer = client.explain(MODEL, PlanRequest(devices=("0",)))
    verdicts = {one.plan.weight_dtype or one.plan.offload: one.verdict for one in answer.candidates}
    assert (answer.code, verdicts) == (
        "out_of_memory",
        {"": "rejected", "model": "rejected", "layerwise": "possible", "float8_e4m3fn": "possible"},
    )


def test_a_strange_offload_is_refused_before_any_rank_is_asked(small: Service) -> None:
    with small.client() as client, pytest.raises(XditError, match="choose model or layerwise") as refused:
        client.open_run(MODEL, PlanRequest(offload="disk"))
    assert refused.value.code == "bad_plan"
