"""A rank of two holds no more than 55 % of a transformer whose weights they share, by tensor parallelism or by sharding; and of
stages, and with weights in fp8, none holds more than the daemon counts with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rank.holding import BOUND, BY_HALF, MODELS, share
from xditd.catalog.detection import recognise
from xditd.daemon.residency import weights
from xditd.models.reading import WeightFile
from xditd.protocol.messages import ModelInfo, Plan
from xditd.protocol.plans import FP8

STAGES = "pipefusion 2"
COUNTED = {
    STAGES: Plan(devices=("0", "1"), pipefusion=2),
    FP8[0]: Plan(devices=("0",), weight_dtype=FP8[0]),
}
"""Plans whose shares are held to what the daemon counts with."""
QUICK = ("HunyuanDiT 1.2",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.soak]) for name in MODELS]
)
def test_each_of_two_ranks_holds_about_half_and_a_stage_and_weights_in_fp8_what_is_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[name]
    path = model.make(tmp_path / "model.safetensors")
    shares = {plan: share(tmp_path / plan, model.family, path, plan) for plan in (*BY_HALF, *COUNTED)}
    found = recognise(WeightFile(path).header, "transformer")
    info = ModelInfo(
        kind="", name="", part="transformer", family=found.family, variant="", dtype="", bytes=0,
        parameters=found.parameters, facts=found.facts,
    )  # fmt: skip
    counted = {
        name: weights(info, "bfloat16", plan) / (2 * found.parameters) for name, plan in COUNTED.items()
    }
    with capsys.disabled():
        print(
            f"\n  {name}: " + ", ".join(f"{plan} {part:.1%}" for plan, part in shares.items()),
            end=" of " + ", ".join(f"{part:.1%}" for part in counted.values()),
        )
    assert all(0.5 <= shares[plan] <= BOUND for plan in BY_HALF)
    for plan, most in counted.items():
        assert most - 0.02 < shares[plan] <= most, plan
