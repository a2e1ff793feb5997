"""`xditctl verify` against a real daemon: plans are held against one device, and told apart."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.live.conftest import Serve
from xditd.cli import comparison
from xditd.cli.xditctl import main
from xditd.protocol.messages import PlanRequest

MODEL, VAE = "diffusion_models/flux.safetensors", "vae/ae.safetensors"


def test_plans_are_held_against_one_device(
    serve: Serve, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(**{"devices.cpu_ranks": 4})
    monkeypatch.setenv("XDITD_ENDPOINT", service.endpoint)
    # What is asked for twice is loaded once beforehand, and what does not wait for each other side by side.
    there = tuple(f"cpu:{number}" for number in range(4))
    asked = ((MODEL, comparison.one_device(there)), (MODEL, comparison.parsed("ulysses=2", there)), (VAE,))
    with service.client() as client, ThreadPoolExecutor(len(asked)) as at_once:
        kept = {load.result().group for load in [at_once.submit(client.load, *one) for one in asked]}
    line = f"verify {MODEL} --vae {VAE} --size 144x176 --steps 3 --json"
    plans = ("ulysses=2", "pipefusion=2", "pipefusion=2,ulysses=2")
    arguments = [*line.split(), *(word for plan in plans for word in ("--plan", plan))]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ulysses, pipefusion, both = json.loads(result.stdout)["plans"]
    with capsys.disabled():
        for one in (ulysses, pipefusion):
            print(
                f"\n  verify, {one['plan']}: {one['largest']:.1e}, PSNR {one['psnr'] or 999:.0f} dB", end=""
            )
    assert (ulysses["verdict"], ulysses["bound"]) == ("exact", 1e-5)
    assert 0 < ulysses["largest"] < 1e-5
    assert ulysses["mean"] < ulysses["largest"]
    assert ulysses["psnr"] > 100
    assert (pipefusion["verdict"], pipefusion["bound"]) == ("approximate", None)
    assert pipefusion["largest"] > 1e-4
    assert pipefusion["psnr"] < ulysses["psnr"]
    assert (both["verdict"], both["code"]) == ("refused", "not_built")
    with service.client() as client:
        groups = client.status().groups
    assert {group.group for group in groups} == kept, (
        "what was not loaded is gone again, what was there has stayed"
    )
    assert not any(group.plan.pipefusion > 1 for group in groups)

    with service.client() as client:
        told = client.explain(MODEL, PlanRequest(devices=("0", "1")), (144, 176)).candidates
    bases = {
        (one.plan.ulysses, one.plan.ring, one.plan.tensor * one.plan.cfg * one.plan.pipefusion): (
            one.basis,
            one.seconds,
        )
        for one in told
        if not one.plan.offload and not one.plan.shard and not one.plan.weight_dtype
    }
    (once, alone), (twice, shared), (other, estimated) = (
        bases[ulysses, ring, 1] for ulysses, ring in ((1, 1), (2, 1), (1, 2))
    )
    assert (once, twice, other) == ("measured", "measured", "calibrated")
    assert min(alone, shared, estimated) > 0

    monkeypatch.setitem(comparison.BOUNDS, "float32", 1e-12)
    monkeypatch.setattr(comparison, "MARGIN", 0.0)
    arguments = [*line.split()[:-1], "--plan", "ulysses=2"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "too far" in result.stdout
    assert "Not as it must be: ulysses 2." in result.stdout


def test_where_nothing_could_be_compared_nothing_is_said_to_be_exact(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(**{"devices.cpu_ranks": 4})
    monkeypatch.setenv("XDITD_ENDPOINT", service.endpoint)
    line = f"verify {MODEL} --devices 0-3 --size 64x64 --steps 1 --plan pipefusion=2,ulysses=2"
    result = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "refused" in result.stdout
    assert "No exact plan was held against one device." in result.stdout
    assert "✅" not in result.stdout


def test_a_plan_is_explained_and_nothing_loaded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(**{"devices.cpu_ranks": 4})
    monkeypatch.setenv("XDITD_ENDPOINT", service.endpoint)
    line = f"plan {MODEL} --gpus 0-3 --size 1024x1024"
    result = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (chosen,) = [row for row in result.stdout.splitlines() if "chosen" in row and "not chosen" not in row]
    assert chosen.startswith("ulysses 4")
    assert "1024" in chosen
    result = CliRunner().invoke(main, [*line.split(), "--ulysses", "3", "--json"], catch_exceptions=False)
    assert result.exit_code == 4
    answer = json.loads(result.stdout)
    assert answer["code"] == "bad_plan"
    assert {one["verdict"] for one in answer["candidates"]} == {"possible", "rejected"}
    with service.client() as client:
        assert client.status().groups == ()
