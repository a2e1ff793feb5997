"""The planner's choice among all the ways that there are, each with the reason for or against it. Pure.

Bytes of a rank are those that `residency` counts: its weights, and the margin for activations
(`devices.activation_memory`). Tokens are those of the picture, 2×2 latent pixels each, over the ranks that split them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import structs

from xditd.daemon import planner
from xditd.daemon.costs import Estimate, tokens_of
from xditd.daemon.residency import weights
from xditd.daemon.work import spell
from xditd.protocol.errors import Code, XditError
from xditd.protocol.explaining import Candidate
from xditd.protocol.messages import ModelInfo, Plan, PlanRequest
from xditd.protocol.plans import DEGREES, FP8, OFFLOADS, degrees_of, shape

OF_TRANSFORMERS = tuple(name for name in DEGREES if name != "patch")
"""Degrees that split what a transformer computes."""

ROUNDED = FP8[0]
"""The 8-bit float that is proposed for weights: of the two the one that ComfyUI's people take."""

NOT_BY_ITSELF = {
    "file": "exact; only by its name, or where memory lacks: every layer is cast each time it runs",
    ROUNDED: "rounds weights, so only by its name: half the memory of 16 bits, every layer is cast as it runs",
    "model": "exact; only by its name, or where memory lacks: every turn waits until all weights have come",
    "layerwise": "exact; only by its name, or where memory lacks: every call waits for all layers to come",
    "shard": "exact; only by its name: for models that do not fit, since every layer is gathered before it runs",
    "pipefusion": "approximate, so only by its name: steps overlap",
    "cfg": "only by its name: of use where the cfg scale is not 1, which is not known when a model is loaded",
    "tensor": "only by its name: for models that do not fit, since every layer waits for its sums",
    "ring": "exact; not chosen, since ulysses sends less where the heads divide",
    "ulysses": "exact; not chosen, since it is not what was asked for",
    "patch": "exact; only where its devices are named, since one decodes most pictures in a moment",
}
"""Why a plan that would work is not taken: the first reason that is of its weights' dtype, its offload, its sharing or one of its degrees above 1."""


def explain(
    request: PlanRequest,
    info: ModelInfo,
    owned: list[str],
    dtype: str,
    margin: int,
    too_large: Callable[[Plan], str],
    size: tuple[int, int] = (0, 0),
    time: Callable[[Plan], Estimate | None] = lambda plan: None,
) -> tuple[tuple[Candidate, ...], XditError | None]:
    """Every candidate over the devices of the request, the chosen one first; and what the request is refused with.

    Args:
        owned: names of the daemon's devices.
        margin: bytes set aside for the activations of a rank.
        too_large: why a plan can never have room; "" where it can.
        size: width and height of the picture in pixels; zeros are not said.
        time: what a step of that size takes under a plan, where that is known.

    Raises:
        XditError: `bad_device`.
    """
    devices = planner.devices(request.devices, owned)
    refusal: XditError | None = None
    chosen: Plan | None = None
    try:
        chosen = planner.with_room(planner.plan(request, info, owned), info, too_large)
        if problem := too_large(chosen):
            refusal = XditError(Code.OUT_OF_MEMORY, f"{problem}.")
    except XditError as error:
        refusal = error
    found: list[Candidate] = []

    def add(plan: Plan, verdict: str, reason: str, code: str = "") -> None:
        takes = time(plan) if verdict != "rejected" else None
        found.append(
            Candidate(
                plan=plan,
                verdict=verdict,
                reason=reason.rstrip("."),
                code=code,
                exact=plan.pipefusion == 1 and plan.weight_dtype not in FP8,
                weights=weights(info, dtype, plan),
                activations=margin,
                tokens=math.ceil(tokens_of(info, size) / (plan.ulysses * plan.ring)),
                seconds=None if takes is None else takes.seconds,
                basis="" if takes is None else takes.basis,
            )
        )

    if chosen is not None:
        if refusal is None:
            add(chosen, "chosen", chosen.reason)
        else:
            add(chosen, "rejected", refusal.message, Code.OUT_OF_MEMORY.value)
    for changes in (*shapes(len(devices), info.part), *memory_plans(len(devices), info)):
        plan = structs.replace(Plan(devices=devices[: _count(changes)]), **changes)
        if chosen is not None and shape(plan) == shape(chosen):
            continue
        try:
            planner.check(plan, info)
        except XditError as error:
            add(plan, "rejected", error.message, spell(error.code))
            continue
        if problem := too_large(plan):
            add(plan, "rejected", problem, Code.OUT_OF_MEMORY.value)
        elif 0 < tokens_of(info, size) < plan.ulysses * plan.ring:
            add(plan, "rejected", "no use: there are more ranks than tokens")
        else:
            add(plan, "possible", _not_taken(plan, len(devices)))
    return tuple(found), refusal


def shapes(count: int, part: str = "transformer") -> list[dict[str, Any]]:
    """Degrees over so many devices: each alone, each pair of them, and one device."""
    if part == "vae":
        return [{"patch": count}, {}] if count > 1 else [{}]
    found: list[dict[str, Any]] = [{name: count} for name in OF_TRANSFORMERS] if count > 1 else []
    if "cfg" in (found[0] if found else {}) and count != planner.GUIDED:
        del found[0]  # a step has two calls at most
    for number, first in enumerate(OF_TRANSFORMERS):
        for second in OF_TRANSFORMERS[number + 1 :]:
            for degree in range(2, count):
                if count % degree == 0 and (first != "cfg" or degree == planner.GUIDED):
                    found.append({first: degree, second: count // degree})
    return [*found, {}]


def memory_plans(count: int, info: ModelInfo) -> list[dict[str, Any]]:
    """Plans that take less of a device's memory: one with offload, and of a transformer one with weights in fp8 and several
    that share its weights."""
    found: list[dict[str, Any]] = [{"offload": offload} for offload in OFFLOADS if offload]
    if info.part == "transformer":
        found.append({"weight_dtype": "file" if info.dtype in FP8 else ROUNDED})
    if count > 1 and info.part == "transformer":
        found += [{name: count, "shard": True} for name in ("ulysses", "ring")]
    return found


def _count(changes: Mapping[str, Any]) -> int:
    """How many devices a plan takes with these."""
    return math.prod(degree for name, degree in changes.items() if name in DEGREES)


def _not_taken(plan: Plan, devices: int) -> str:
    """Why a plan that would work over so many devices is not the one."""
    words = {plan.weight_dtype, plan.offload, "shard" if plan.shard else "", *degrees_of(plan)}
    idle = f"exact; leaves {devices - len(plan.devices)} of {devices} devices idle"
    return next((reason for word, reason in NOT_BY_ITSELF.items() if word in words), idle)
