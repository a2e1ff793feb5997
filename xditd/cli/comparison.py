"""Which plans are held against one device, by which figures, and what an exact one must keep to. Pure.

Figures of a latent are differences from that of one device, over its standard deviation. The bound of float32 is that
of docs/exactness.md; of the short dtypes it is 16 steps of their rounding (eps 2⁻⁷ of bfloat16, 2⁻¹⁰ of float16), since
there every other order of a sum rounds otherwise: a floor below which nothing can be told, not a proof.

A sampling carries rounding from step to step, and a model that is sure of what it draws makes more of it: so the bound is never
below twice of what one device itself makes of noise that is shaken a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import structs

from xditd.cli import words
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Plan, PlanRequest
from xditd.protocol.plans import DEGREES, FP8, spread_devices

if TYPE_CHECKING:
    import torch

BOUNDS = {"float32": 1e-5, "float16": 16 * 2.0**-10, "bfloat16": 16 * 2.0**-7}
"""By compute dtype: the largest difference that an exact plan may have."""

SHAKEN = 1e-6
"""By how much of itself each value of the noise is changed, to see what a sampling makes of it."""

MARGIN = 2.0
"""How many times that an exact plan may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A plan held against one device.

    Attributes:
        plan: as it is spelled.
        exact: it must keep to the bound.
        largest, mean: difference of the latent, over the standard deviation of one device's; None where it was refused.
        bound: as `bound` says; None where the plan is approximate.
        psnr: of the decoded pictures in dB, `math.inf` where they are equal; None where none was decoded.
        ratio: seconds of its sampling over those of one device.
        problem: why it was not done.
        code: of that.
    """

    plan: str
    exact: bool = True
    largest: float | None = None
    mean: float | None = None
    bound: float | None = None
    psnr: float | None = None
    ratio: float | None = None
    problem: str = ""
    code: str = ""

    @property
    def verdict(self) -> str:
        """ "exact", "approximate", "too far", "refused" or "failed"."""
        if self.problem:
            return "refused" if self.code in REFUSALS else "failed"
        if self.bound is None:
            return "approximate"
        return "exact" if self.largest is not None and self.largest <= self.bound else "too far"

    @property
    def good(self) -> bool:
        return self.verdict in ("exact", "approximate", "refused")


REFUSALS = frozenset({Code.BAD_PLAN.value, Code.NOT_BUILT.value})
"""Codes of a plan that the model cannot have, which says nothing against any other."""


KEPT = ("offload", "weight_dtype")
"""What a plan says by a word beside its degrees."""


def bound(dtype: str, shaken: float) -> float:
    """The largest difference that an exact plan may have.

    Args:
        dtype: of the arithmetic.
        shaken: largest difference of one device's own latent, from shaken noise.
    """
    return max(BOUNDS[dtype], MARGIN * shaken)


def shake(noise: torch.Tensor) -> torch.Tensor:
    """Noise of which each value differs by `SHAKEN` of itself, one way or the other."""
    ways = 1 - 2 * (noise.flatten().argsort().argsort() % 2)
    return noise * (1 + SHAKEN * ways.view(noise.shape))


def singly(names: Iterable[str]) -> tuple[str, ...]:
    """Devices as they were named, each by itself: plans are made of how many there are."""
    return tuple(single for name in names for single in spread_devices(name))


def candidates(devices: tuple[str, ...]) -> list[PlanRequest]:
    """Every strategy over these devices, alone and, where they are even in number, in pairs."""
    count = len(devices)
    shapes: list[dict[str, Any]] = []
    if count > 1:
        shapes += [{name: count} for name in ("ulysses", "ring", "tensor", "pipefusion")]
        shapes.append({"ulysses": count, "shard": True})
    if count % 2 == 0:
        shapes.append({"cfg": 2} if count == 2 else {"cfg": 2, "ulysses": count // 2})
    if count % 2 == 0 and count > 2:
        half = count // 2
        shapes += [{"ulysses": half, "ring": 2}, {"tensor": half, "ulysses": 2}, {"cfg": 2, "tensor": half}]
        shapes.append({"cfg": 2, "pipefusion": half})
    return [structs.replace(PlanRequest(devices=devices, fallback="never"), **shape) for shape in shapes]


def parsed(text: str, devices: tuple[str, ...]) -> PlanRequest:
    """ "ulysses=2,ring=2", also with "shard", "offload=layerwise" or "weight_dtype=file", or a strategy's name, over the first
    of these devices that it needs.

    Raises:
        XditError: `bad_plan`.
    """
    if "=" not in text:
        return PlanRequest(strategy=text, devices=devices, fallback="never")
    degrees: dict[str, int] = {}
    kept: dict[str, str] = {}
    shard = False
    for part in map(str.strip, text.split(",")):
        name, _, value = part.partition("=")
        if part == "shard":
            shard = True
        elif name in KEPT:
            kept[name] = value
        elif name in DEGREES and value.isdecimal() and int(value) > 0:
            degrees[name] = int(value)
        else:
            raise XditError(
                Code.BAD_PLAN,
                f"{part!r} is no degree: write {', '.join(DEGREES)} with a number, as in ulysses=2, or shard, "
                "or offload=layerwise, or weight_dtype=file.",
            )
    needed = math.prod(degrees.values())
    if needed > len(devices):
        raise XditError(Code.BAD_PLAN, f"{text} needs {needed} devices, and there are {len(devices)}.")
    request = PlanRequest(devices=devices[:needed], shard=shard, fallback="never")
    return structs.replace(request, **kept, **degrees)


def spelled(request: PlanRequest) -> str:
    name = words.spelled(request) or (request.strategy if len(request.devices) != 1 else "one device")
    return name + words.moved(request)


def one_device(devices: tuple[str, ...]) -> PlanRequest:
    return PlanRequest(devices=devices[:1], fallback="never")


def is_exact(plan: Plan, warmup: int, steps: int) -> bool:
    """PipeFusion is exact only where every step is warm-up; rounded weights never are."""
    return plan.weight_dtype not in FP8 and (plan.pipefusion == 1 or warmup >= steps)


def differences(latent: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Largest and mean difference [B, C, h, w], over the reference's standard deviation; infinite where not finite."""
    apart = (latent.double() - reference.double()).abs() / reference.double().std()
    largest, mean = float(apart.max()), float(apart.mean())
    return (largest, mean) if math.isfinite(largest) else (math.inf, math.inf)


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1: −10·log₁₀ of the mean squared difference, in dB."""
    squared = float(((image.double() - reference.double()) ** 2).mean())
    return math.inf if squared == 0 else -10 * math.log10(squared)


def plain(one: Compared) -> dict[str, object]:
    """For programs: an infinite figure is None there, since JSON has none."""
    figures = {field: getattr(one, field) for field in one.__dataclass_fields__}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    return {**finite, "verdict": one.verdict}
