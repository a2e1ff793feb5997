"""A rank of two holds no more than 55 % of a transformer whose weights they share, by tensor parallelism or by sharding; and of
stages none holds more than the daemon counts with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rank.holding import BOUND, BY_HALF, MODELS, share
from xditd.catalog.detection import recognise
from xditd.daemon.residency import weights
from xditd.models.reading import WeightFile
from xditd.protocol.messages import ModelInfo, Plan

STAGES = "pipefusion 2"
QUICK = ("HunyuanDiT 1.2",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.soak]) for name in MODELS]
)
def test_each_of_two_ranks_holds_about_half_and_a_stage_what_is_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[name]
    path = model.make(tmp_path / "model.safetensors")
    shares = {plan: share(tmp_path / plan, model.family, path, plan) for plan in (*BY_HALF, STAGES)}
    found = recognise(WeightFile(path).header, "transformer")
    info = ModelInfo(
        kind="", name="", part="transformer", family=found.family, variant="", dtype="", bytes=0,
        parameters=found.parameters, facts=found.facts,
    )  # fmt: skip
    counted = weights(info, "bfloat16", Plan(devices=("0", "1"), pipefusion=2)) / (2 * found.parameters)
    with capsys.disabled():
        print(
            f"\n  {name}: " + ", ".join(f"{plan} {part:.1%}" for plan, part in shares.items()),
            end=f" of {counted:.1%}",
        )
    assert all(0.5 <= shares[plan] <= BOUND for plan in BY_HALF)
    assert counted - 0.02 < shares[STAGES] <= counted
