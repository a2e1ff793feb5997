"""What is asked and what is there become a plan, or a sentence that says what would work."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.catalog.sparse_files import FLUX_DEV
from xditd.daemon.planner import SHRINKING, plan, replicas, rungs
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import DEGREES


def flux(heads: int = 24) -> m.ModelInfo:
    return m.ModelInfo(
        kind="diffusion_models",
        name="flux.safetensors",
        part="transformer",
        family="flux",
        variant="dev",
        dtype="bfloat16",
        bytes=1,
        parameters=1,
        facts=FLUX_DEV | {"width": heads * 128, "heads": heads},
    )  # fmt: skip


VAE = m.ModelInfo(
    kind="vae",
    name="ae",
    part="vae",
    family="autoencoder_kl",
    variant="",
    dtype="float32",
    bytes=1,
    parameters=1,
)

GPUS = [f"cuda:{index}" for index in range(8)]


def degrees(made: m.Plan) -> tuple[int, int]:
    return made.ulysses, made.ring


@pytest.mark.parametrize(
    ("heads", "devices", "expected"),
    [
        (24, 1, (1, 1)),
        (24, 2, (2, 1)),
        (24, 4, (4, 1)),
        (24, 8, (8, 1)),
        (2, 4, (2, 2)),
        (3, 2, (1, 2)),
        (24, 5, (1, 5)),
    ],
)
def test_auto_takes_ulysses_as_far_as_the_heads_divide_and_ring_for_the_rest(heads, devices, expected):
    made = plan(m.PlanRequest(), flux(heads), GPUS[:devices])
    assert degrees(made) == expected
    assert len(made.devices) == devices


def test_devices_are_named_one_by_one_or_as_spans():
    made = plan(m.PlanRequest(devices=("0", "cuda:2-3", "5-6")), VAE, GPUS)
    assert made.devices == ("cuda:0", "cuda:2", "cuda:3", "cuda:5", "cuda:6")


def test_a_vae_takes_one_device():
    assert plan(m.PlanRequest(), VAE, GPUS).devices == ("cuda:0",)


def test_the_devices_that_are_named_for_a_vae_share_its_pictures():
    made = plan(m.PlanRequest(devices=("0-3",)), VAE, GPUS)
    assert (made.patch, len(made.devices)) == (4, 4)
    assert made.reason == "exact; 4 devices share each picture"
    assert plan(m.PlanRequest(patch=2), VAE, GPUS).devices == ("cuda:0", "cuda:1")
    assert [(rung.patch, rung.offload) for rung in rungs(made, VAE)] == [(2, ""), (1, ""), (1, "model")]


@pytest.mark.parametrize(
    "request_", [m.PlanRequest(strategy="USP", devices=("0", "1")), m.PlanRequest(ulysses=2)]
)
def test_a_vae_has_no_other_strategy(request_: m.PlanRequest):
    with pytest.raises(XditError, match="patch would work"):
        plan(request_, VAE, GPUS)


def test_a_transformer_has_no_patches():
    with pytest.raises(XditError, match="patch 2 is not built for a Flux transformer"):
        plan(m.PlanRequest(patch=2), flux(), GPUS)


def test_devices_are_named_by_index_or_in_full_and_keep_their_order():
    made = plan(m.PlanRequest(devices=("3", "cuda:1")), flux(), GPUS)
    assert made.devices == ("cuda:3", "cuda:1")


def test_degrees_alone_take_as_many_devices_as_they_need():
    made = plan(m.PlanRequest(ulysses=2, ring=2), flux(), GPUS)
    assert made.devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert degrees(made) == (2, 2)


def test_cfg_computes_cond_and_uncond_side_by_side_and_splits_each_by_its_sequence():
    pair = plan(m.PlanRequest(strategy="CFG", devices=("0", "1")), flux(), GPUS)
    assert (pair.cfg, *degrees(pair)) == (2, 1, 1)
    four = plan(m.PlanRequest(strategy="CFG", devices=("0", "1", "2", "3")), flux(), GPUS)
    assert (four.cfg, *degrees(four)) == (2, 2, 1)
    assert "side by side" in four.reason


def test_cfg_is_never_chosen_by_itself():
    assert plan(m.PlanRequest(devices=("0", "1")), flux(), GPUS).cfg == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (m.PlanRequest(devices=("0", "1")), m.PlanRequest(devices=("0", "1"), ulysses=2)),
        (m.PlanRequest(devices=("0", "1")), m.PlanRequest(devices=("0", "1"), strategy="USP")),
        (m.PlanRequest(devices=("0", "1"), strategy="Tensor"), m.PlanRequest(devices=("0", "1"), tensor=2)),
        (m.PlanRequest(devices=("0", "1"), strategy="CFG"), m.PlanRequest(devices=("0", "1"), cfg=2)),
    ],
)
def test_the_same_plan_in_other_words_is_the_same_plan(one, other):
    """Or the model would be loaded once for each way of asking, on the same devices."""
    assert plan(one, flux(), GPUS) == plan(other, flux(), GPUS)


def test_a_degree_left_open_is_filled():
    assert degrees(plan(m.PlanRequest(ring=2, devices=("0", "1", "2", "3")), flux(), GPUS)) == (2, 2)
    assert degrees(plan(m.PlanRequest(ulysses=2, devices=("0", "1", "2", "3")), flux(), GPUS)) == (2, 2)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (m.PlanRequest(strategy="Tensor", devices=("0-3",)), (1, 4, 1, 1)),
        (m.PlanRequest(strategy="Tensor", cfg=2, devices=("0-3",)), (2, 2, 1, 1)),
        (m.PlanRequest(strategy="Tensor", tensor=2, devices=("0-3",)), (1, 2, 2, 1)),
        (m.PlanRequest(strategy="Hybrid", tensor=8, devices=("0-7",)), (1, 8, 1, 1)),
        (m.PlanRequest(strategy="Tensor", devices=("0",)), (1, 1, 1, 1)),
    ],
)
def test_the_layers_are_shared_where_that_is_asked(request_, expected):
    made = plan(request_, flux(), GPUS)
    assert (made.cfg, made.tensor, made.ulysses, made.ring) == expected
    assert "tensor" not in made.reason
    assert len(made.devices) == 1 or made.reason


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (m.PlanRequest(strategy="PipeFusion", devices=("0-3",)), (1, 4)),
        (m.PlanRequest(strategy="PipeFusion", cfg=2, devices=("0-3",)), (2, 2)),
        (m.PlanRequest(strategy="PipeFusion", pipefusion=2, devices=("0", "1")), (1, 2)),
        (m.PlanRequest(strategy="PipeFusion", devices=("0",)), (1, 1)),
    ],
)
def test_stages_take_the_devices_that_no_other_degree_speaks_for(request_, expected):
    made = plan(request_, flux(), GPUS)
    assert (made.cfg, made.pipefusion) == expected
    assert made.ulysses == made.ring == made.tensor == 1
    assert ("approximate" in made.reason) == (made.pipefusion > 1)


def test_no_strategy_is_approximate_that_was_not_chosen_by_name():
    for strategy in ("auto", "Hybrid", "USP", "Tensor", "CFG"):
        assert plan(m.PlanRequest(strategy=strategy), flux(), GPUS[:2]).pipefusion == 1


def test_there_are_no_more_stages_than_blocks():
    with pytest.raises(XditError) as refused:
        plan(m.PlanRequest(strategy="PipeFusion"), flux(), [f"cuda:{i}" for i in range(60)])
    assert refused.value.code == "bad_plan"
    assert "57 would work" in refused.value.message


def test_ulysses_divides_the_heads_that_tensor_leaves():
    with pytest.raises(XditError) as refused:
        plan(m.PlanRequest(tensor=2, ulysses=2, devices=("0-3",)), flux(heads=6), GPUS)
    assert refused.value.code == "bad_plan"
    assert "the 3 heads that tensor 2 leaves each rank" in refused.value.message


@pytest.mark.parametrize(
    ("request_", "code", "word"),
    [
        (m.PlanRequest(ulysses=3, devices=("0", "1")), "bad_plan", "ulysses 3 makes 3, but 2 devices"),
        (m.PlanRequest(ulysses=2, ring=2, devices=("0", "1")), "bad_plan", "ulysses 2 × ring 2 makes 4"),
        (m.PlanRequest(ulysses=16), "bad_plan", "needs 16 devices"),
        (m.PlanRequest(ulysses=5, devices=("0", "1", "2", "3", "4")), "bad_plan", "24"),
        (m.PlanRequest(devices=("9",)), "bad_device", "cuda:0"),
        (m.PlanRequest(devices=("1", "cuda:1")), "bad_device", "twice"),
        (m.PlanRequest(devices=("1-3", "cuda:2-4")), "bad_device", "twice"),
        (m.PlanRequest(devices=("3-1",)), "bad_device", "no device '3-1'"),
        (m.PlanRequest(devices=("6-9",)), "bad_device", "no device '8'"),
        (m.PlanRequest(pipefusion=2, ulysses=2, devices=("0-3",)), "not_built", "together with ulysses"),
        (m.PlanRequest(pipefusion=2, tensor=2, devices=("0-3",)), "not_built", "together with tensor"),
        (m.PlanRequest(strategy="magic"), "bad_plan", "auto"),
        (
            m.PlanRequest(strategy="Tensor", devices=("0", "1", "2", "3", "4")),
            "bad_plan",
            "1, 2, 3, 4, 6, 8, 12, 24",
        ),
        (m.PlanRequest(tensor=8, ulysses=2, devices=("0-7",)), "bad_plan", "makes 16"),
        (m.PlanRequest(tensor=5, devices=("0-4",)), "bad_plan", "tensor 5 does not divide the 24 heads"),
        (m.PlanRequest(strategy="CFG", devices=("0",)), "bad_plan", "cfg 2 makes 2, but 1 device"),
        (m.PlanRequest(strategy="CFG", devices=("0", "1", "2")), "bad_plan", "cfg 2 makes 2, but 3 devices"),
        (m.PlanRequest(ulysses=1, ring=1, devices=("0", "1")), "bad_plan", "leave a degree open"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(request_, code, word):
    with pytest.raises(XditError) as refused:
        plan(request_, flux(), GPUS)
    assert refused.value.code == code
    assert word in refused.value.message


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (m.PlanRequest(devices=("0-7",)), ["01234567"]),
        (m.PlanRequest(devices=("0-7",), replicas=1), ["01234567"]),
        (m.PlanRequest(devices=("0-7",), replicas=2), ["0123", "4567"]),
        (m.PlanRequest(replicas=4), ["01", "23", "45", "67"]),
        (m.PlanRequest(replicas=8), list("01234567")),
        (m.PlanRequest(replicas=3, ulysses=2), ["01", "23", "45"]),
        (m.PlanRequest(replicas=2, devices=("5", "1", "cuda:2", "0")), ["51", "20"]),
    ],
)
def test_devices_are_dealt_out_in_their_order(request_, expected):
    plans = replicas(request_, flux(), GPUS)
    assert ["".join(name[-1] for name in made.devices) for made in plans] == expected
    assert all(degrees(made)[0] * degrees(made)[1] == len(made.devices) for made in plans)


def test_replicas_of_what_takes_one_device_take_one_each():
    assert [made.devices for made in replicas(m.PlanRequest(replicas=2), VAE, GPUS)] == [
        ("cuda:0",),
        ("cuda:1",),
    ]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (m.PlanRequest(replicas=3), ["8 devices", "3 replicas", "1 or 2 or 4 or 8"]),
        (m.PlanRequest(replicas=9), ["9 replicas"]),
        (m.PlanRequest(replicas=5, ulysses=2), ["needs 10 devices", "owns 8"]),
        (m.PlanRequest(replicas=2, ulysses=3, devices=("0-7",)), ["ulysses 3", "4 devices"]),
        (m.PlanRequest(scheduling="random"), ["'random'", "round_robin", "adaptive"]),
    ],
)
def test_replicas_that_do_not_come_out_even_are_refused_with_what_would(request_, words):
    with pytest.raises(XditError, match="bad_plan") as refused:
        replicas(request_, flux(), GPUS)
    for word in words:
        assert word in refused.value.message


@pytest.mark.parametrize(
    ("asked", "code", "why"),
    [
        ({"devices": ("0",)}, "bad_plan", "name more devices, or use offload"),
        ({"strategy": "Tensor", "devices": ("0-1",)}, "bad_plan", "of no use with tensor 2"),
        ({"strategy": "PipeFusion", "devices": ("0-1",)}, "bad_plan", "of no use with pipefusion 2"),
        ({"ulysses": 2, "offload": "layerwise"}, "not_built", "either alone is"),
    ],
    ids=str,
)
def test_weights_are_sharded_where_that_makes_sense_and_else_refused(asked, code, why):
    with pytest.raises(XditError, match=why) as refused:
        plan(m.PlanRequest(shard=True, **asked), flux(), GPUS)
    assert refused.value.code == code


def test_sharding_goes_with_ulysses_ring_and_cfg_and_says_so():
    for asked in ({"ulysses": 2}, {"ring": 2}, {"cfg": 2, "ulysses": 2}):
        made = plan(m.PlanRequest(shard=True, **asked), flux(), GPUS)
        assert made.shard
        assert "gathers a layer" in made.reason


@pytest.mark.parametrize(
    "asked", [{"shard": True, "ulysses": 2}, {"offload": "model"}, {"offload": "layerwise"}]
)
def test_a_model_without_weights_has_none_to_share_or_to_offload(asked):
    echo = structs.replace(VAE, kind="echo", name="echo", part="", family="echo", parameters=0)
    with pytest.raises(XditError, match=r"echo has no weights to (shard|offload); leave") as caught:
        plan(m.PlanRequest(**asked), echo, GPUS)
    assert caught.value.code == Code.BAD_PLAN


@pytest.mark.parametrize(
    ("asked", "info", "code", "why"),
    [
        ({"weight_dtype": "fp8"}, flux(), "bad_plan", "choose file, float8_e4m3fn, float8_e5m2, or none"),
        ({"weight_dtype": "file"}, flux(), "bad_plan", "flux.safetensors is in bfloat16; float8_e4m3fn or"),
        ({"weight_dtype": "float8_e5m2"}, VAE, "bad_plan", "for diffusion models"),
        (
            {"weight_dtype": "float8_e5m2", "ulysses": 2, "shard": True},
            flux(),
            "not_built",
            "either alone is, and weight_dtype with tensor or offload",
        ),
    ],
    ids=["strange", "not-in-fp8", "vae", "sharded"],
)
def test_weights_that_cannot_be_kept_in_fp8_are_refused(asked, info, code, why):
    with pytest.raises(XditError, match=why) as refused:
        plan(m.PlanRequest(**asked), info, GPUS)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "asked",
    [
        {"ulysses": 2},
        {"ring": 2, "cfg": 2},
        {"strategy": "Tensor", "devices": ("0-1",)},
        {"strategy": "PipeFusion", "devices": ("0-1",), "offload": "layerwise"},
        {"devices": ("0",), "offload": "model"},
    ],
    ids=str,
)
def test_weights_in_fp8_go_with_every_other_plan_and_say_so(asked):
    made = plan(m.PlanRequest(weight_dtype="float8_e4m3fn", **asked), flux(), GPUS)
    assert made.weight_dtype == "float8_e4m3fn"
    assert made.reason.endswith("; its weights are rounded to float8_e4m3fn, and cast layer by layer")


def test_every_degree_can_be_given_up():
    assert sorted(SHRINKING) == sorted(DEGREES)
