"""Numbers and structs as people read them: "41.2 GiB", "2 min 14 s", "ulysses 2 × ring 2". Pure."""

from __future__ import annotations

from collections.abc import Sequence

from xditd.protocol.messages import ModelRef, Plan, PlanRequest
from xditd.protocol.plans import LoraMatch, degrees_of, spell_degrees, spell_weights

OK = "✅"
WARNING = "⚠️ "
FAILED = "❌"

UNKNOWN = "–"
"""Stands where the hardware or the daemon does not tell."""


def size(count: int | None) -> str:
    """Bytes: "512 B", "41.2 GiB"."""
    if count is None:
        return UNKNOWN
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def share(used: int | None, total: int | None) -> str:
    """ "41.0 of 140 GiB", "128 MiB of 16.0 GiB"; "" where one of them is not known."""
    if used is None or total is None:
        return ""
    part, whole = size(used), size(total)
    same = part.split()[1] == whole.split()[1]
    return f"{part.split()[0] if same else part} of {whole}"


def count(number: int) -> str:
    """Parameters: "84 M", "11.9 B"."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            value = number / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return str(number)


def duration(seconds: float | None) -> str:
    """Seconds: "0.42 s", "8.3 s", "2 min 14 s", "3 h 5 min", "2 d 4 h"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, length, lesser, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{whole} s"


def plural(number: int, noun: str) -> str:
    """ "1 run", "2 runs", "no runs"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def joined(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def degrees(plan: Plan) -> str:
    """The degrees above 1: "ulysses 2 × ring 2"; "1 device" where there are none. With where its weights are."""
    return (spelled(plan) or "1 device") + moved(plan)


def moved(plan: Plan | PlanRequest) -> str:
    """ ", sharded", ", layerwise offload", ", weights in float8_e5m2": where the weights are, if not all of them on every device,
    and in what, if not in what they are computed in; else ""."""
    offload = f", {plan.offload} offload" if plan.offload else ""
    kept = f", weights in {spell_weights(plan)}" if plan.weight_dtype else ""
    return offload + (", sharded" if plan.shard else "") + kept


def spelled(plan: Plan | PlanRequest) -> str:
    """The degrees above 1 alone; "" where there are none."""
    return spell_degrees(degrees_of(plan))


def degraded(reason: str) -> str:
    """A line about a result that was had with less than was asked for."""
    return f"{WARNING} degraded: {reason}"


def lora(match: LoraMatch) -> str:
    """ "ink.safetensors × 0.8: 36 of 40 modules, and 12 of text encoders left as they are"."""
    text = f", and {match.text} of text encoders left as they are" if match.text else ""
    return f"{match.name} × {match.strength:g}: {match.matched} of {match.modules} modules{text}"


def model(ref: ModelRef) -> str:
    """ "vae/ae.safetensors", and "checkpoints/x.safetensors (vae)" for a part of a checkpoint."""
    return f"{ref.kind}/{ref.name}" + (f" ({ref.part})" if ref.kind == "checkpoints" and ref.part else "")
