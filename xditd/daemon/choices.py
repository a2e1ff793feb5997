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
from xditd.daemon.costs import PATCH, Estimate, alike
from xditd.daemon.residency import weights
from xditd.protocol.errors import Code, XditError
from xditd.protocol.explaining import Candidate
from xditd.protocol.messages import ModelInfo, Plan, PlanRequest
from xditd.protocol.plans import DEGREES as ALL_DEGREES
from xditd.protocol.plans import OFFLOADS

DEGREES = ("cfg", "ulysses", "ring", "pipefusion", "tensor")

NOT_BY_ITSELF = {
    "pipefusion": "approximate, so only by its name: steps overlap",
    "cfg": "only by its name: of use where the cfg scale is not 1, which is not known when a model is loaded",
    "tensor": "only by its name: for models that do not fit, since every layer waits for its sums",
    "ring": "exact; not chosen, since ulysses sends less where the heads divide",
    "ulysses": "exact; not chosen, since it is not what was asked for",
    "patch": "exact; only where its devices are named, since one decodes most pictures in a moment",
    "shard": "exact; only by its name: for models that do not fit, since every layer is gathered before it runs",
    "model": "exact; only by its name, or where memory lacks: every turn waits until all weights have come",
    "layerwise": "exact; only by its name, or where memory lacks: every call waits for all layers to come",
}
"""Why a plan that would work is not taken, by its offload or the first of its degrees that is above 1."""


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
        chosen = planner.plan(request, info, owned)
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
                exact=plan.pipefusion == 1,
                weights=weights(info, dtype, plan),
                activations=margin,
                tokens=_tokens(info, plan, size),
                seconds=None if takes is None else takes.seconds,
                basis="" if takes is None else takes.basis,
            )
        )

    if chosen is not None and refusal is None:
        add(chosen, "chosen", chosen.reason)
    elif chosen is not None and refusal is not None:
        add(chosen, "rejected", refusal.message, Code.OUT_OF_MEMORY.value)
    offloads: list[dict[str, Any]] = [{"offload": offload} for offload in OFFLOADS if offload]
    sharded: list[dict[str, Any]] = [{name: len(devices), "shard": True} for name in ("ulysses", "ring")]
    further = offloads + (sharded if len(devices) > 1 and info.part == "transformer" else [])
    for shape in shapes(len(devices), info.part) + further:
        plan = structs.replace(Plan(devices=devices[: _count(shape)]), **shape)
        if chosen is not None and alike(plan, chosen):
            continue
        try:
            planner.check(plan, info)
        except XditError as error:
            add(plan, "rejected", error.message, str(error.code))
            continue
        if problem := too_large(plan):
            add(plan, "rejected", problem, Code.OUT_OF_MEMORY.value)
        elif 0 < _all_tokens(info, size) < plan.ulysses * plan.ring:
            add(plan, "rejected", "no use: there are more ranks than tokens")
        else:
            first = (
                plan.offload
                or ("shard" if plan.shard else "")
                or next((name for name in NOT_BY_ITSELF if _above(plan, name)), "")
            )
            idle = len(devices) - len(plan.devices)
            add(
                plan,
                "possible",
                NOT_BY_ITSELF.get(first, f"exact; leaves {idle} of {len(devices)} devices idle"),
            )
    return tuple(found), refusal


def shapes(count: int, part: str = "transformer") -> list[dict[str, Any]]:
    """Degrees over so many devices: each alone, each pair of them, and one device."""
    if part == "vae":
        return [{"patch": count}, {}] if count > 1 else [{}]
    found: list[dict[str, Any]] = [{name: count} for name in DEGREES] if count > 1 else []
    if "cfg" in (found[0] if found else {}) and count != planner.GUIDED:
        del found[0]  # a step has two calls at most
    for number, first in enumerate(DEGREES):
        for second in DEGREES[number + 1 :]:
            for degree in range(2, count):
                if count % degree == 0 and (first != "cfg" or degree == planner.GUIDED):
                    found.append({first: degree, second: count // degree})
    return [*found, {}]


def _count(shape: Mapping[str, Any]) -> int:
    """How many devices it takes."""
    return math.prod(degree for name, degree in shape.items() if name in ALL_DEGREES)


def _above(plan: Plan, name: str) -> bool:
    return name in ALL_DEGREES and getattr(plan, name) > 1


def _all_tokens(info: ModelInfo, size: tuple[int, int]) -> int:
    side = info.facts.get("scale", 8) * PATCH
    return math.prod(math.ceil(pixels / side) for pixels in size)


def _tokens(info: ModelInfo, plan: Plan, size: tuple[int, int]) -> int:
    return math.ceil(_all_tokens(info, size) / (plan.ulysses * plan.ring))
