"""Which sigmas a family is sampled with, and how its latents are scaled. Pure: numbers in, numbers out.

Flux and SD3 are rectified flows: sigma goes from 1 (noise) to 0 (picture), and is shifted towards the noisy end by

    shifted(sigma) = exp(mu) / (exp(mu) + 1 / sigma - 1)

which is `time_shift` of black-forest-labs/flux (src/flux/sampling.py) with its exponent of 1. FLUX.1-dev takes
mu = 1.15 at 1024×1024 and, as ComfyUI has it, at any size; FLUX.1-schnell takes none (mu = 0 changes nothing).
Evenly spaced and shifted, they are what ComfyUI's scheduler "simple" gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo


@dataclass(frozen=True, slots=True)
class Habits:
    """What a variant is sampled with where nobody says otherwise.

    Attributes:
        mu: of the shift.
        steps: that are usual.
        guidance: that is usual; None where the model takes none.
        scale, shift: a latent as the model has it is (latent as ComfyUI shows it − shift) × scale.
    """

    mu: float
    steps: int
    guidance: float | None
    scale: float = 0.3611
    shift: float = 0.1159


_HABITS = {
    ("flux", "dev"): Habits(mu=1.15, steps=20, guidance=3.5),
    ("flux", "schnell"): Habits(mu=0.0, steps=4, guidance=None),
    **{
        # ComfyUI's shift of 3 is exp(mu).
        ("sd3", variant): Habits(mu=math.log(3.0), steps=28, guidance=None, scale=1.5305, shift=0.0609)
        for variant in ("3", "3.5_large", "3.5_medium")
    },
}


def habits(info: ModelInfo) -> Habits:
    """The habits of a model.

    Raises:
        XditError: `bad_value` for a model that is not sampled, or not by this version.
    """
    known = _HABITS.get((info.family, info.variant))
    if known is None:
        there = ", ".join(" ".join(pair) for pair in _HABITS)
        raise XditError(
            Code.BAD_VALUE,
            f"{info.kind}/{info.name} is {info.family} {info.variant}, which `xditctl sample` has no schedule for; "
            f"it has one for {there}.",
        )
    return known


def sigmas(steps: int, mu: float, denoise: float = 1.0) -> tuple[float, ...]:
    """`steps` + 1 descending sigmas, the last of them 0.

    Args:
        steps: of the loop, at least 1.
        mu: of the shift.
        denoise: in (0, 1]: below 1 a schedule of steps / denoise steps is made, and its end taken, as ComfyUI does.
    """
    whole = max(steps, int(steps / denoise))
    return (*(shifted(1 - i / whole, mu) for i in range(whole - steps, whole)), 0.0)


def shifted(sigma: float, mu: float) -> float:
    """A sigma in (0, 1], shifted."""
    return 1 / (1 + (1 / sigma - 1) / math.exp(mu))  # divided through: 1 stays exactly 1
