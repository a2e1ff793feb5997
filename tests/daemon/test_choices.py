"""Every plan that there is, and the reason for or against it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from msgspec import structs

from tests.daemon.test_planner import GPUS, VAE, flux
from xditd.catalog.catalog import Found
from xditd.daemon.choices import NOT_BY_ITSELF, explain, shapes
from xditd.daemon.groups import Group
from xditd.daemon.residency import Residency
from xditd.daemon.runs import Key
from xditd.protocol import messages as m
from xditd.protocol.explaining import Candidate
from xditd.protocol.plans import DEGREES, OFFLOADS

FOUR = ("0-3",)
MARGIN = 512 << 20


def candidates(request: m.PlanRequest, info=None, size=(0, 0), too_large=lambda plan: ""):
    info = info or structs.replace(flux(), parameters=12_000_000)
    return explain(request, info, GPUS, "bfloat16", MARGIN, too_large, size)


def only(
    found: tuple[Candidate, ...],
    offload: str = "",
    shard: bool = False,
    weight_dtype: str = "",
    **degrees: int,
) -> Candidate:
    names = ("cfg", "ulysses", "ring", "pipefusion", "tensor")
    alike = [c for c in found if all(getattr(c.plan, name) == degrees.get(name, 1) for name in names)]
    wanted = (offload, shard, weight_dtype)
    (one,) = [c for c in alike if (c.plan.offload, c.plan.shard, c.plan.weight_dtype) == wanted]
    return one


def test_the_choice_comes_first_and_every_other_plan_has_its_reason():
    found, refusal = candidates(m.PlanRequest(devices=FOUR))
    assert refusal is None
    assert found[0].verdict == "chosen"
    assert (found[0].plan.ulysses, found[0].reason) == (4, "exact; ulysses, since 24 heads divide by 4")
    assert [one.verdict for one in found].count("chosen") == 1
    assert all(one.reason for one in found)
    assert "approximate" in only(found, pipefusion=4).reason
    assert not only(found, pipefusion=4).exact
    assert "cfg scale" in only(found, cfg=2, ulysses=2).reason
    assert only(found).reason == "exact; leaves 3 of 4 devices idle"
    both = only(found, ulysses=2, pipefusion=2)
    assert (both.verdict, both.code) == ("rejected", "not_built")


def test_heads_that_do_not_divide_are_the_reason():
    found, _ = candidates(m.PlanRequest(devices=FOUR), flux(heads=6))
    rejected = only(found, tensor=4)
    assert (rejected.verdict, rejected.code) == ("rejected", "bad_plan")
    assert "does not divide the 6 heads" in rejected.reason


def test_a_rank_is_told_its_bytes_and_its_tokens():
    found, _ = candidates(m.PlanRequest(devices=FOUR), size=(1024, 768))
    assert (only(found, ulysses=4).weights, only(found, tensor=4).weights) == (24_000_000, 6_000_000)
    # A stage has 14 or 15 of 57 blocks, and the first has none but double ones, each 2.4 times a single one.
    assert only(found, pipefusion=4).weights == pytest.approx(0.434 * 24_000_000, rel=1e-2)
    assert {one.activations for one in found} == {MARGIN}
    assert (only(found).tokens, only(found, ulysses=4).tokens) == (64 * 48, 16 * 48)


def test_more_ranks_than_tokens_are_of_no_use():
    found, _ = candidates(m.PlanRequest(strategy="Tensor", devices=FOUR), size=(16, 32))
    assert (only(found, ring=4).verdict, only(found, ring=4).reason) == (
        "rejected",
        "no use: there are more ranks than tokens",
    )


def test_what_has_no_room_is_rejected_and_the_request_with_it():
    found, refusal = candidates(
        m.PlanRequest(devices=FOUR), too_large=lambda plan: "" if plan.tensor == 4 else "It needs 24 GiB"
    )
    assert refusal is not None
    assert refusal.code == "out_of_memory"
    assert (found[0].plan.ulysses, found[0].verdict) == (4, "rejected")
    assert only(found, tensor=4).verdict == "possible"


def test_a_request_that_would_be_refused_is_told_with_what_there_is_instead():
    found, refusal = candidates(m.PlanRequest(ulysses=5, devices=FOUR))
    assert refusal is not None
    assert refusal.code == "bad_plan"
    assert {one.verdict for one in found} == {"possible", "rejected"}


def test_a_vae_has_one_device_and_may_have_more_that_share_its_pictures():
    found, _ = candidates(m.PlanRequest(), VAE)
    assert found[0].plan.devices == ("cuda:0",)
    assert only(found, "model").verdict == "possible"
    assert only(found, "layerwise").reason.startswith("layerwise offload is of no use for an AutoencoderKL")
    assert [(one.plan.patch, one.verdict) for one in found[1:] if not one.plan.offload] == [(8, "possible")]


def test_a_plan_with_offload_is_named_with_what_it_has_on_a_device():
    info = structs.replace(flux(), parameters=11_900_000_000)
    found, _ = candidates(m.PlanRequest(devices=FOUR), info)
    assert (only(found, "model").verdict, only(found, "layerwise").verdict) == ("possible", "possible")
    assert only(found, "model").weights == 2 * info.parameters
    # Flux.1 dev: a double block has 339.8 million parameters, what is in no block 64.2 million.
    assert only(found, "layerwise").weights == pytest.approx(2 * (2 * 339.8e6 + 64.2e6), rel=1e-3)
    shared = only(found, shard=True, ulysses=4)
    assert shared.verdict == "possible"
    assert shared.weights == pytest.approx(2 * (64.2e6 + (11.9e9 - 64.2e6) / 4 + 2 * 339.8e6), rel=1e-3)
    found, refusal = candidates(m.PlanRequest(devices=("0",), offload="layerwise"), info)
    assert refusal is None
    assert (found[0].verdict, found[0].plan.offload) == ("chosen", "layerwise")
    assert only(found).reason == "exact; leaves 0 of 1 devices idle"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_no_plan_comes_twice(count):
    made = [tuple(sorted(shape.items())) for shape in shapes(count)]
    assert len(made) == len(set(made))
    assert ((("cfg", count),) in made) == (count == 2)


def test_what_a_plan_is_said_to_take_is_what_it_is_counted_with_awake_and_asleep():
    info = structs.replace(flux(), parameters=12_000_000)
    residency = Residency(SimpleNamespace(memory=lambda pool: None), margin=MARGIN)
    found = Found(path="/flux", info=info, prefix="")
    found_all, _ = candidates(m.PlanRequest(devices=FOUR), info)
    listed = [one for one in found_all if not one.plan.weight_dtype]
    assert {one.weights for one in listed} >= {24_000_000, 12_000_000, 6_000_000}
    for one in listed:
        key = Key("/flux", "", "bfloat16", one.plan)
        assert residency.needs(found, key) == dict.fromkeys(one.plan.devices, one.weights + one.activations)
        group = Group("g1", 1, m.ModelRef(kind="diffusion_models", name="flux"), found, key, started=0.0)
        asleep = 0 if one.plan.offload else one.weights * len(one.plan.devices)
        assert residency.host_bytes(group) == asleep


def test_weights_in_fp8_are_half_of_16_bits_and_the_layer_that_is_cast():
    # Flux.1 dev: a double block has 339.8 million parameters, what is in no block 64.2 million.
    info = structs.replace(flux(), parameters=11_900_000_000)
    residency = Residency(SimpleNamespace(memory=lambda pool: None), margin=MARGIN)
    found = Found(path="/flux", info=info, prefix="")
    listed, _ = candidates(m.PlanRequest(devices=("0",)), info)
    rounded = only(listed, weight_dtype="float8_e4m3fn")
    assert (rounded.verdict, rounded.exact, rounded.code) == ("possible", False, "")
    assert "rounds weights" in rounded.reason
    resting = (11.9e9 - 64.2e6) + 2 * 64.2e6
    assert rounded.weights == pytest.approx(resting + 2 * 339.8e6, rel=1e-4)
    key = Key("/flux", "", "bfloat16", rounded.plan)
    assert residency.needs(found, key) == {"cuda:0": rounded.weights + MARGIN}
    group = Group("g1", 1, m.ModelRef(kind="diffusion_models", name="flux"), found, key, started=0.0)
    assert residency.host_bytes(group) == pytest.approx(resting, rel=1e-4)

    def weights(**plan):
        request = m.PlanRequest(weight_dtype="float8_e5m2", **plan)
        chosen, refusal = candidates(request, info)
        assert refusal is None
        assert chosen[0].verdict == "chosen"
        return chosen[0].weights

    assert weights(devices=("0-1",), tensor=2) == pytest.approx(rounded.weights / 2, rel=1e-4)
    assert weights(devices=("0",), offload="layerwise") == pytest.approx(
        2 * 64.2e6 + 2 * 339.8e6 + 2 * 339.8e6, rel=1e-3
    )


def test_the_fp8_of_a_file_is_kept_where_there_is_no_other_room_for_it():
    info = structs.replace(flux(), parameters=11_900_000_000, dtype="float8_e4m3fn")
    large = {"": "no room", "file": ""}

    def chosen(request, too_large, info=info):
        listed, refusal = candidates(request, info, too_large=too_large)
        return listed[0], refusal

    one, refusal = chosen(m.PlanRequest(devices=("0",)), lambda plan: "")
    assert (one.plan.weight_dtype, refusal) == ("", None)
    one, refusal = chosen(m.PlanRequest(devices=("0",)), lambda plan: large.get(plan.weight_dtype, ""))
    assert (one.plan.weight_dtype, one.exact, refusal) == ("file", True, None)
    assert one.reason == "one device; its weights stay in the fp8 of their file, and are cast layer by layer"
    one, refusal = chosen(m.PlanRequest(devices=("0",)), lambda plan: "no room")
    assert (one.verdict, refusal.code) == ("rejected", "out_of_memory")
    bf16 = structs.replace(info, dtype="bfloat16")
    one, refusal = chosen(m.PlanRequest(devices=("0",)), lambda plan: large.get(plan.weight_dtype, ""), bf16)
    assert (one.plan.weight_dtype, refusal.code) == ("", "out_of_memory")


def test_whatever_a_plan_may_have_there_is_a_reason_for_not_taking_it_by_itself():
    assert sorted(NOT_BY_ITSELF) == sorted({*DEGREES, *OFFLOADS, "shard", "file", "float8_e4m3fn"} - {""})
