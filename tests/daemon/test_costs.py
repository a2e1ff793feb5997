"""What a step takes: the arithmetic of real models, what is sent under each plan, and measured steps that correct it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from bench.scaling.published import FLUX, HUNYUAN, PIXART, SD3, degrees
from tests.daemon.test_planner import VAE
from xditd.daemon.costs import SPEEDS, call_of, estimate, speed_of, step
from xditd.daemon.experience import Experience
from xditd.daemon.runs import Key
from xditd.protocol.plans import Plan

SIZE = (1024, 1024)
H100 = "NVIDIA H100 80GB HBM3"
L40 = "NVIDIA L40"


def plan(shape: str = "1", **more: Any) -> Plan:
    made = degrees(shape)
    count = 1
    for degree in made.values():
        count *= degree
    return Plan(devices=tuple(f"cuda:{i}" for i in range(count)), **made, **more)


def seconds(model, shape: str, device: str = H100, size=SIZE) -> float:
    return step(model, plan(shape), size, "bfloat16", speed_of(device))


def test_the_arithmetic_of_flux_is_what_was_counted_on_a_gpu():
    call = call_of(FLUX, SIZE)
    assert (call.linear / 1e12, call.attention / 1e12) == pytest.approx((59.5, 14.9), rel=0.01)


@pytest.mark.parametrize("model", [FLUX, SD3, PIXART, HUNYUAN], ids=lambda model: model.family)
def test_more_pixels_take_longer_and_more_devices_less(model):
    assert seconds(model, "1", size=(2048, 2048)) > 4 * seconds(model, "1") * 0.9
    for shape in ("ulysses 2", "ring 2", "tensor 2"):
        assert seconds(model, "1") / 2 < seconds(model, shape) < seconds(model, "1")


def test_links_decide_between_plans_as_the_table_of_xdit_has_it():
    assert seconds(FLUX, "ulysses 4", L40) < seconds(FLUX, "tensor 4", L40)
    assert seconds(FLUX, "pipefusion 4", L40) < seconds(FLUX, "ulysses 4", L40)
    slower = seconds(FLUX, "tensor 4", L40) / seconds(FLUX, "1", L40)
    assert slower > seconds(FLUX, "tensor 4") / seconds(FLUX, "1"), "PCIe costs tensor more than NVLink does"


def test_cfg_is_of_use_where_a_step_makes_two_calls():
    assert seconds(SD3, "cfg 2") == pytest.approx(seconds(SD3, "1") / 2, rel=0.01)
    assert seconds(FLUX, "cfg 2") >= seconds(FLUX, "1")


def test_a_measured_step_is_told_as_it_was_and_corrects_the_others():
    measured = [(plan(), 2 * seconds(FLUX, "1"))]
    told = {
        shape: estimate(FLUX, plan(shape), SIZE, "bfloat16", H100, measured) for shape in ("1", "ulysses 2")
    }
    assert (told["1"].basis, told["1"].seconds) == ("measured", measured[0][1])
    assert told["ulysses 2"].basis == "calibrated"
    assert told["ulysses 2"].seconds == pytest.approx(2 * seconds(FLUX, "ulysses 2"))
    assert estimate(FLUX, plan("ulysses 2"), SIZE, "bfloat16", H100).basis == "estimate"


@pytest.mark.parametrize(
    ("model", "device", "size"),
    [(FLUX, "Voodoo 2", SIZE), (VAE, H100, SIZE), (FLUX, H100, (0, 0))],
    ids=["device", "model", "size"],
)
def test_what_is_not_known_is_not_told(model, device, size):
    assert estimate(model, plan(), size, "bfloat16", device) is None


def test_shared_weights_are_waited_for_where_the_links_are_slow_and_hidden_where_they_are_fast():
    def ratio(device: str, size: tuple[int, int]) -> float:
        shared = step(
            structs.replace(FLUX, parameters=11_900_000_000),
            plan("ulysses 2", shard=True),
            size,
            "bfloat16",
            speed_of(device),
        )
        return shared / seconds(FLUX, "ulysses 2", device, size)

    assert 1 < ratio(H100, SIZE) < 1.05, "a layer comes while the one before it runs"
    assert ratio(L40, (256, 256)) > 2, "24 GB a call come slower than few tokens are computed"


def test_a_step_of_shared_weights_is_not_told_as_one_of_whole_ones():
    shared, whole = plan("ulysses 2", shard=True), plan("ulysses 2")
    for measured, other in ((shared, whole), (whole, shared)):
        seen = [(measured, 7.0)]
        assert estimate(FLUX, measured, SIZE, "bfloat16", H100, seen).basis == "measured"
        assert estimate(FLUX, other, SIZE, "bfloat16", H100, seen).basis == "calibrated"


def test_what_has_no_steps_is_told_none_whatever_was_measured():
    decoded = [(plan(), 3.0)]
    assert estimate(VAE, plan(), SIZE, "bfloat16", H100, decoded) is None
    assert estimate(structs.replace(VAE, part="clip"), plan(), SIZE, "bfloat16", H100, decoded) is None


def test_weights_that_wait_in_the_hosts_memory_have_no_estimate():
    assert estimate(FLUX, plan(offload="layerwise"), SIZE, "bfloat16", H100) is None


def test_a_card_is_known_by_its_own_name_and_not_by_that_of_a_lesser_one():
    assert speed_of("NVIDIA H100 PCIe") == SPEEDS["H100 PCIe"]
    assert speed_of("NVIDIA H200") == SPEEDS["H200"] != SPEEDS["H20"]
    assert speed_of("NVIDIA A100-SXM4-80GB") == SPEEDS["A100"]


def test_a_models_steps_are_those_of_its_own_file_part_and_dtype():
    experience = Experience()
    experience.turn(Key("a", "transformer", "bfloat16", plan()), 3.0, effort=1.5)
    experience.turn(Key("b", "transformer", "bfloat16", plan()), 9.0, effort=1.0)
    assert experience.steps("a", "transformer", "bfloat16", effort=2.0) == [(plan(), 4.0)]


def test_runs_and_loads_are_told_by_such_as_had_the_same_plan_on_whichever_devices():
    def key(devices: tuple[str, ...], **more: Any) -> Key:
        return Key("a", "transformer", "bfloat16", Plan(devices=devices, **more))

    experience = Experience()
    one, offloaded = key(("cuda:0",)), key(("cuda:0",), offload="layerwise")
    two, shared = key(("cuda:0", "cuda:1"), ulysses=2), key(("cuda:0", "cuda:1"), ulysses=2, shard=True)
    for number, known in enumerate((one, offloaded, two, shared), start=1):
        experience.run(known, 1.0 * number)
        experience.load(known, 10.0 * number)
    assert [experience.run_seconds(k) for k in (one, offloaded, two, shared)] == [1.0, 2.0, 3.0, 4.0]
    assert [experience.load_seconds(k) for k in (one, offloaded, two, shared)] == [10.0, 20.0, 30.0, 40.0]
    elsewhere = key(("cuda:6", "cuda:7"), ulysses=2, reason="exact")
    assert (experience.run_seconds(elsewhere), experience.load_seconds(elsewhere)) == (3.0, 30.0)
    assert experience.load_seconds(key(("cuda:0", "cuda:1"), ring=2)) is None
