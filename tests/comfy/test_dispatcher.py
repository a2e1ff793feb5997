"""XDIT_DISPATCHER and the choices of the loaders. Needs no ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_nodes.dispatcher import (
    SCHEDULINGS,
    STRATEGIES,
    WEIGHT_DTYPES,
    Dispatcher,
    device_names,
    refuse_unbuilt,
    weight_dtype,
)
from xditd.protocol.errors import XditError
from xditd.protocol.messages import ModelRef, PlanRequest

BUILT: dict[str, Any] = {
    "strategy": "auto",
    "scheduling": "round_robin",
    "allow_approximate": False,
}


def dispatcher(**changes: Any) -> Dispatcher:
    model = ModelRef(kind="checkpoints", name="flux.safetensors", size=7)
    return Dispatcher(
        "", **{"model": model, "plan": PlanRequest(devices=("0", "1"), strategy="USP"), **changes}
    )


def test_two_wishes_for_the_same_are_one() -> None:
    """A KSampler compares its MODEL's with its XDIT_DISPATCHER, which may come out of ComfyUI's cache."""
    assert dispatcher() == dispatcher()
    assert dispatcher() != dispatcher(plan=PlanRequest(devices=("0",)))
    assert dispatcher() != dispatcher(
        plan=PlanRequest(devices=("0", "1"), strategy="USP", weight_dtype="float8_e5m2")
    )
    assert dispatcher() != dispatcher(plan=PlanRequest(devices=("0", "1"), strategy="USP", replicas=2))


def test_a_part_of_a_checkpoint_is_on_one_of_its_devices() -> None:
    part = dispatcher().part("vae")
    assert (part.model.part, part.model.name, part.model.size) == ("vae", "flux.safetensors", 7)
    assert part.plan == PlanRequest(devices=("0",))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("  ", ()),
        ("0", ("0",)),
        ("0,1,2,3", ("0", "1", "2", "3")),
        ("cuda:1, cuda:0", ("cuda:1", "cuda:0")),
        ("0-3", ("0", "1", "2", "3")),
        ("0, cuda:2-3", ("0", "cuda:2", "cuda:3")),
        ("0\uff0c1", ("0", "1")),  # a Chinese keyboard's comma
    ],
)
def test_gpu_devices_as_people_write_them(text: str, names: tuple[str, ...]) -> None:
    assert device_names(text) == names


@pytest.mark.parametrize(
    "text", ["0,,1", "all", "0;1", "-1", "cuda", "gpu:0", "0,1,0", "0-2,1", "3-1", "0-", "²"]
)
def test_gpu_devices_that_name_none_are_refused(text: str) -> None:
    with pytest.raises(XditError) as refused:
        device_names(text)
    assert refused.value.code == "bad_device"


def test_what_is_built_passes() -> None:
    for strategy in STRATEGIES:
        refuse_unbuilt(**{**BUILT, "strategy": strategy})
    for scheduling in SCHEDULINGS:
        refuse_unbuilt(**{**BUILT, "scheduling": scheduling})


@pytest.mark.parametrize(
    "choice",
    [
        {"allow_approximate": True},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_aloud(choice: dict[str, Any]) -> None:
    with pytest.raises(XditError) as refused:
        refuse_unbuilt(**{**BUILT, **choice})
    assert refused.value.code == "not_built"
    assert "choose" in refused.value.message


def test_a_choice_that_there_is_not_is_refused() -> None:
    with pytest.raises(XditError) as refused:
        refuse_unbuilt(**{**BUILT, "strategy": "Magic"})
    assert refused.value.code == "bad_value"


def test_weight_dtype_is_the_stock_loaders_and_what_is_not_built_says_what_is() -> None:
    assert list(WEIGHT_DTYPES) == ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
    built = {chosen: weight_dtype(chosen) for chosen in ("default", "fp8_e4m3fn", "fp8_e5m2")}
    assert built == {"default": "", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
    with pytest.raises(XditError, match="choose fp8_e4m3fn, which keeps the same weights") as refused:
        weight_dtype("fp8_e4m3fn_fast")
    assert refused.value.code == "not_built"
    with pytest.raises(XditError, match="There is no weight_dtype 'fp4'; choose default, fp8") as refused:
        weight_dtype("fp4")
    assert refused.value.code == "bad_value"
