"""How plans are held against one device: which there are, by which figures, and what is good enough."""

from __future__ import annotations

import math

import pytest
import torch

from xditd.cli import comparison
from xditd.cli.comparison import Compared
from xditd.cli.models import names
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Plan


def test_every_strategy_is_a_candidate_alone_and_in_pairs():
    def plans(*devices):
        return [comparison.spelled(one) for one in comparison.candidates(devices)]

    assert plans("0") == []
    assert plans("0", "1") == [
        "ulysses 2",
        "ring 2",
        "tensor 2",
        "pipefusion 2",
        "ulysses 2, sharded",
        "cfg 2",
    ]
    assert plans("0", "1", "2") == ["ulysses 3", "ring 3", "tensor 3", "pipefusion 3", "ulysses 3, sharded"]
    four = plans("0", "1", "2", "3")
    assert {"cfg 2 × ulysses 2", "ulysses 2 × ring 2", "cfg 2 × tensor 2", "cfg 2 × pipefusion 2"} < set(four)
    assert all(one.fallback == "never" for one in comparison.candidates(("0", "1"))), (
        "no lesser plan in its name"
    )


def test_a_plan_is_written_as_its_degrees_or_its_strategy():
    two = comparison.parsed("ulysses=2,ring=2", ("0", "1", "2", "3", "4"))
    assert (two.ulysses, two.ring, two.devices) == (2, 2, ("0", "1", "2", "3"))
    assert comparison.parsed("Tensor", ("0", "1")).strategy == "Tensor"
    shared, offloaded = (comparison.parsed(t, ("0", "1")) for t in ("ulysses=2,shard", "offload=layerwise"))
    assert (shared.ulysses, shared.shard, comparison.spelled(shared)) == (2, True, "ulysses 2, sharded")
    assert (offloaded.devices, comparison.spelled(offloaded)) == (("0",), "one device, layerwise offload")
    rounded = comparison.parsed("ring=2,weight_dtype=float8_e5m2", ("0", "1"))
    assert (rounded.ring, comparison.spelled(rounded)) == (2, "ring 2, weights in float8_e5m2")
    for text, words in (("ulises=2", "no degree"), ("ring=x", "no degree"), ("ring=4", "needs 4 devices")):
        with pytest.raises(XditError, match=words):
            comparison.parsed(text, ("0", "1"))


@pytest.mark.parametrize(
    ("plan", "exact"),
    [
        ({"ulysses": 2}, True),
        ({"weight_dtype": "file"}, True),
        ({"weight_dtype": "float8_e4m3fn"}, False),
        ({"pipefusion": 2}, False),
    ],
    ids=str,
)
def test_overlapping_steps_and_rounded_weights_are_not_exact(plan, exact):
    assert comparison.is_exact(Plan(devices=("0", "1"), **plan), warmup=1, steps=6) == exact


def test_devices_are_named_one_by_one_or_as_a_span():
    assert comparison.singly(names("0-2, cuda:3")) == ("0", "1", "2", "cuda:3")
    assert comparison.singly(names("")) == ()


def test_the_bound_is_of_the_dtype_or_of_what_one_device_makes_of_shaken_noise():
    assert comparison.bound("float32", 1e-6) == comparison.BOUNDS["float32"]
    assert comparison.bound("float32", 4e-4) == pytest.approx(8e-4)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shaken = comparison.shake(noise)
    torch.testing.assert_close((shaken / noise - 1).abs(), torch.full_like(noise, comparison.SHAKEN))
    assert 0.3 < (shaken.abs() > noise.abs()).double().mean() < 0.7, "one way or the other"


def test_figures_are_over_the_standard_deviation_of_one_devices_latent():
    reference = torch.tensor([[[[0.0, 2.0, 4.0, 6.0]]]])
    largest, mean = comparison.differences(reference + torch.tensor([0.0, 0.0, 0.0, 1.0]), reference)
    assert largest == pytest.approx(1 / reference.std().item())
    assert mean == pytest.approx(largest / 4)
    assert comparison.differences(reference * math.nan, reference) == (math.inf, math.inf)
    picture = torch.full((1, 2, 2, 3), 0.5)
    assert comparison.psnr(picture, picture) == math.inf
    assert comparison.psnr(picture + 0.1, picture) == pytest.approx(20.0, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "verdict", "good"),
    [
        ({"largest": 1e-6, "bound": 1e-5}, "exact", True),
        ({"largest": 2e-5, "bound": 1e-5}, "too far", False),
        ({"largest": math.inf, "bound": 1e-5}, "too far", False),
        ({"largest": 0.3, "exact": False}, "approximate", True),
        ({"problem": "No.", "code": "not_built"}, "refused", True),
        ({"problem": "It died.", "code": "rank_lost"}, "failed", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_an_exact_plan_can_be_too_far(fields, verdict, good):
    one = Compared(plan="ulysses 2", **fields)
    assert (one.verdict, one.good) == (verdict, good)
    assert comparison.plain(one)["verdict"] == verdict


def test_pipefusion_is_exact_where_every_step_is_warm_up():
    plan = Plan(devices=("0", "1"), pipefusion=2)
    assert comparison.is_exact(plan, warmup=4, steps=4)
    assert not comparison.is_exact(plan, warmup=3, steps=4)
    assert comparison.is_exact(Plan(devices=("0", "1"), ulysses=2), warmup=1, steps=4)
