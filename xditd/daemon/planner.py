"""From what was asked to how the model runs: a plan, or a refusal that says what would work.

Pure: it is told the model's facts and the names of the devices. Unless pipefusion is named, the choice is exact: sequence parallelism
(USP), ulysses as far as the heads divide and ring for the rest, and by itself never cfg, since whether a sampling is
guided is not known when its model is loaded, nor tensor, which is for models that do not fit; a VAE or a text encoder
takes one device, but of several that are named all of a VAE's share its pictures (patch).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec import structs

from xditd.catalog.families import family
from xditd.daemon.scheduling import POLICIES
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, PlanRequest
from xditd.protocol.plans import DEGREES, FP8, OFFLOADS, WEIGHT_DTYPES, spell_degrees, spread_devices

STRATEGIES = ("auto", "usp", "hybrid", "cfg", "tensor", "pipefusion")
"""In lower case. auto, usp and hybrid mean sequence parallelism for what no degree speaks for."""

FILLING = ("tensor", "pipefusion")
"""Strategies whose own degree takes the devices that no other degree speaks for."""

FALLBACKS = ("auto", "never")
"""What a request may say of a plan that cannot be had: with less, or not at all."""

GUIDED = 2
"""Calls of a step with classifier-free guidance: the degree of the strategy cfg, unless another is named."""


def replicas(request: PlanRequest, info: ModelInfo, owned: list[str]) -> tuple[Plan, ...]:
    """The plan of every replica: the devices are dealt out in their order, as many to each.

    Raises:
        XditError: as `plan`; `bad_plan` where the devices cannot be shared out evenly.
    """
    if request.scheduling not in POLICIES:
        raise XditError(
            Code.BAD_PLAN, f"There is no scheduling {request.scheduling!r}; choose {', '.join(POLICIES)}."
        )
    count = request.replicas or 1
    if count == 1:
        return (plan(request, info, owned),)
    given = _degrees(request)
    each = math.prod(given.values()) if given or not family(info.family).parallel else 0
    devices = _devices(request.devices, owned, wanted=each * count or len(owned))
    if len(devices) % count:
        fitting = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise XditError(
            Code.BAD_PLAN,
            f"{len(devices)} devices cannot be shared out evenly to {count} replicas; "
            f"{' or '.join(fitting)} would go, or another number of devices.",
        )
    size = len(devices) // count
    return tuple(
        plan(structs.replace(request, devices=devices[first : first + size]), info, owned)
        for first in range(0, len(devices), size)
    )


SHRINKING = ("ring", "ulysses", "pipefusion", "tensor", "cfg", "patch")
"""The degrees in the order in which a fallback gives them up: first those whose loss costs nothing but time."""


def rungs(plan: Plan, info: ModelInfo) -> tuple[Plan, ...]:
    """The plans below one, nearest first: its degrees halved one after the other, down to one device; then one device
    with less and less of the weights on it. Where the file is in fp8, each also with its weights kept so.

    Those that the model's family would refuse are left out.
    """
    found: list[Plan] = [plan]
    shares = {name: getattr(plan, name) for name in SHRINKING}
    for name in SHRINKING:
        while shares[name] > 1:
            shares[name] = shares[name] // 2 if shares[name] % 2 == 0 else 1
            count = math.prod(shares.values())
            kept = {name: degree for name, degree in shares.items() if degree > 1}
            shard = plan.shard and shares["ulysses"] * shares["ring"] > 1
            rung = structs.replace(plan, devices=plan.devices[:count], shard=shard, **shares)
            found.append(structs.replace(rung, reason=_reason(kept, info, rung)))
    last = structs.replace(found[-1], devices=plan.devices[:1], shard=False)
    for offload in OFFLOADS[OFFLOADS.index(plan.offload) + 1 :]:
        rung = structs.replace(last, offload=offload)
        found.append(structs.replace(rung, reason=_reason({}, info, rung)))
    both = [one for rung in found for one in (rung, *in_fp8(rung, info))]
    return tuple(rung for rung in both[1:] if not _refused(rung, info))


def in_fp8(plan: Plan, info: ModelInfo) -> tuple[Plan, ...]:
    """The plan with weights kept as a file in fp8 has them; () where that is not to be had. The numbers are the same."""
    kept = structs.replace(plan, weight_dtype="file", reason=plan.reason + WEIGHTS["file"])
    return () if plan.weight_dtype or _refused(kept, info) else (kept,)


def with_room(plan: Plan, info: ModelInfo, too_large: Callable[[Plan], str]) -> Plan:
    """The plan; or with weights kept in the file's fp8, where it can have room so alone.

    Args:
        too_large: why a plan can never have room; "" where it can.
    """
    smaller = in_fp8(plan, info) if too_large(plan) else ()
    return next((kept for kept in smaller if not too_large(kept)), plan)


def _refused(plan: Plan, info: ModelInfo) -> bool:
    try:
        check(plan, info)
    except XditError:
        return True
    return False


def check(plan: Plan, info: ModelInfo) -> None:
    """Refuses a plan that this model cannot run under.

    Raises:
        XditError: `bad_plan`, `not_built`.
    """
    found = family(info.family)
    found.check_plan(info, plan)
    if (plan.offload or plan.shard) and not found.part:
        what = "offload" if plan.offload else "shard"
        raise XditError(Code.BAD_PLAN, f"{info.name} has no weights to {what}; leave {what} out.")
    if plan.weight_dtype:
        _check_weight_dtype(plan, info)
    if plan.shard:
        _check_shard(plan, info)
    if plan.offload == "layerwise" and not found.layers:
        raise XditError(
            Code.BAD_PLAN,
            f"layerwise offload is of no use for {found.label}, whose activations take more than its weights; offload model "
            "would work.",
        )


def fallback(request: PlanRequest, configured: str) -> bool:
    """Whether less may be had where the plan cannot.

    Args:
        configured: what counts where the request does not say.

    Raises:
        XditError: `bad_plan` for a word that there is not.
    """
    word = request.fallback or configured
    if word not in FALLBACKS:
        raise XditError(
            Code.BAD_PLAN, f"There is no fallback {request.fallback!r}; choose {' or '.join(FALLBACKS)}."
        )
    return word != "never"


def _check_weight_dtype(plan: Plan, info: ModelInfo) -> None:
    if plan.weight_dtype not in WEIGHT_DTYPES:
        raise XditError(
            Code.BAD_PLAN,
            f"There is no weight_dtype {plan.weight_dtype!r}; choose {', '.join(filter(None, WEIGHT_DTYPES))}, or none.",
        )
    if info.part != "transformer" or not family(info.family).layers:
        raise XditError(
            Code.BAD_PLAN,
            f"weight_dtype {plan.weight_dtype} is for diffusion models, and {info.name} is none; leave it out.",
        )
    if plan.weight_dtype == "file" and info.dtype not in FP8:
        raise XditError(
            Code.BAD_PLAN,
            f"weight_dtype file keeps the fp8 of a file, and {info.name} is in {info.dtype or 'blocks'}; {' or '.join(FP8)} would "
            "round it to that.",
        )
    if plan.shard:
        raise XditError(
            Code.NOT_BUILT,
            f"shard together with weight_dtype {plan.weight_dtype} is not built in this version; either alone is, and weight_dtype "
            "with tensor or offload.",
        )


def _check_shard(plan: Plan, info: ModelInfo) -> None:
    beside = next((name for name in ("pipefusion", "tensor") if getattr(plan, name) > 1), "")
    if beside:
        raise XditError(
            Code.BAD_PLAN,
            f"shard is of no use with {beside} {getattr(plan, beside)}, by which ranks hold a part of the weights already; "
            "leave one of them out.",
        )
    if plan.ulysses * plan.ring < 2:
        raise XditError(
            Code.BAD_PLAN,
            f"shard deals the weights of {info.name} out to the ranks of ulysses and ring, and this plan has one of them; "
            "name more devices, or use offload.",
        )
    if plan.offload:
        raise XditError(
            Code.NOT_BUILT,
            f"shard together with {plan.offload} offload is not built in this version; either alone is.",
        )


def plan(request: PlanRequest, info: ModelInfo, owned: list[str]) -> Plan:
    """The plan for a model.

    Args:
        request: what was asked; 0 and () leave the planner the choice.
        info: the model.
        owned: names of the daemon's devices, in order ("cuda:0", "cuda:1").

    Raises:
        XditError: `bad_device`, `bad_plan`, or `not_built` for what this version has not.
    """
    strategy = request.strategy.lower() or "auto"
    if strategy not in STRATEGIES:
        raise XditError(
            Code.BAD_PLAN,
            f"There is no strategy {request.strategy!r}; choose auto, USP, Hybrid, CFG, PipeFusion or Tensor.",
        )
    if request.offload not in OFFLOADS:
        raise XditError(
            Code.BAD_PLAN, f"There is no offload {request.offload!r}; choose model or layerwise, or none."
        )
    given = _degrees(request)
    product = math.prod(given.values())
    single = not family(info.family).parallel
    devices = _devices(request.devices, owned, wanted=product if given else (1 if single else len(owned)))
    if len(devices) % product:
        raise XditError(
            Code.BAD_PLAN,
            f"{spell_degrees(given) or 'The plan'} makes {product}, but {len(devices)} device{'s are' if len(devices) > 1 else ' is'} "
            f"given; the product of the degrees must be the number of devices.",
        )
    rest = len(devices) // product
    degrees = dict(given)
    if rest > 1 and strategy in FILLING and not single and strategy not in given:
        degrees[strategy] = rest
    elif rest > 1 and info.part == "vae" and strategy in ("auto", "hybrid") and not given:
        degrees["patch"] = rest
    elif rest > 1:
        degrees = _fill(degrees, rest, info)
        if math.prod(degrees.values()) != len(devices):
            raise XditError(
                Code.BAD_PLAN,
                f"{spell_degrees(given) or 'The plan'} makes {product}, but {len(devices)} devices are given; leave a degree open or "
                f"name {product} device{'s' if product > 1 else ''}.",
            )
    chosen = Plan(
        devices=devices,
        offload=request.offload,
        shard=request.shard,
        weight_dtype=request.weight_dtype,
        reason="",
        **degrees,
    )
    check(chosen, info)
    return structs.replace(chosen, reason=_reason(degrees, info, chosen))


def _degrees(request: PlanRequest) -> dict[str, int]:
    """The degrees that were asked for, by name or by the strategy."""
    named = {name: getattr(request, name) for name in DEGREES}
    given = {name: degree for name, degree in named.items() if degree}
    if request.strategy.lower() == "cfg":
        given.setdefault("cfg", GUIDED)
    return given


def devices(names: tuple[str, ...], owned: list[str]) -> tuple[str, ...]:
    """The devices of these names; all of them where none is named.

    Raises:
        XditError: `bad_device`.
    """
    return _devices(names, owned, wanted=len(owned))


def _devices(names: tuple[str, ...], owned: list[str], wanted: int) -> tuple[str, ...]:
    if not names:
        if wanted > len(owned):
            raise XditError(
                Code.BAD_PLAN,
                f"The plan needs {wanted} devices, but the daemon owns {len(owned)}: {', '.join(owned)}.",
            )
        return tuple(owned[:wanted])
    resolved = []
    for name in (single for given in names for single in spread_devices(given)):
        matches = [device for device in owned if name in (device, device.partition(":")[2])]
        if not matches:
            raise XditError(
                Code.BAD_DEVICE, f"The daemon owns no device {name!r}; it owns {', '.join(owned)}."
            )
        resolved.append(matches[0])
    if len(set(resolved)) != len(resolved):
        raise XditError(Code.BAD_DEVICE, f"A device is named twice in {', '.join(names)}.")
    return tuple(resolved)


def _fill(degrees: dict[str, int], rest: int, info: ModelInfo) -> dict[str, int]:
    """Gives the devices that no degree speaks for to sequence parallelism, ulysses before ring."""
    filled = dict(degrees)
    if "ulysses" not in degrees:
        heads = info.facts.get("heads", 1) // degrees.get("tensor", 1)
        ulysses = max(d for d in range(1, rest + 1) if rest % d == 0 and heads % d == 0)
        if "ring" in degrees and ulysses != rest:
            return filled
        filled["ulysses"] = ulysses
        rest //= ulysses
    if "ring" not in degrees:
        filled["ring"] = rest
    return filled


OFFLOADED = {
    "": "",
    "model": "; its weights wait in the host's memory and come for a turn",
    "layerwise": "; its weights wait in the host's memory and come layer by layer",
}


SHARDED = "; each rank holds a share of the weights, and gathers a layer before it runs"


WEIGHTS = {
    "": "",
    "file": "; its weights stay in the fp8 of their file, and are cast layer by layer",
    **{name: f"; its weights are rounded to {name}, and cast layer by layer" for name in FP8},
}


def _reason(degrees: dict[str, int], info: ModelInfo, plan: Plan) -> str:
    """One sentence, which follows from the plan alone: the same plan in other words is the same plan."""
    kept = OFFLOADED[plan.offload] + (SHARDED if plan.shard else "") + WEIGHTS[plan.weight_dtype]
    return _shared(degrees, info, len(plan.devices)) + kept


def _shared(degrees: dict[str, int], info: ModelInfo, devices: int) -> str:
    if devices == 1:
        return "one device"
    if degrees.get("patch", 1) > 1:
        return f"exact; {degrees['patch']} devices share each picture"
    if degrees.get("pipefusion", 1) > 1:
        return "approximate, since steps overlap; exact where every step is warm-up"
    if degrees.get("cfg", 1) > 1:
        return "exact; cond and uncond side by side, where the cfg scale is not 1"
    if degrees.get("tensor", 1) > 1:
        return f"exact; each rank holds 1/{degrees['tensor']} of the large layers"
    heads = info.facts.get("heads", 1)
    if degrees.get("ring", 1) == 1:
        return f"exact; ulysses, since {heads} heads divide by {degrees.get('ulysses', 1)}"
    return f"exact; ulysses as far as {heads} heads divide, ring for the rest"
