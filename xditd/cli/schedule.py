"""Which sigmas a family is sampled with, and how its latents are scaled. Pure: numbers in, numbers out.

Flux and SD3 are rectified flows: sigma goes from 1 (noise) to 0 (picture), and is shifted towards the noisy end by

    shifted(sigma) = exp(mu) / (exp(mu) + 1 / sigma - 1)

which is `time_shift` of black-forest-labs/flux (src/flux/sampling.py) with its exponent of 1. FLUX.1-dev takes
mu = 1.15 at 1024×1024 and, as ComfyUI has it, at any size; FLUX.1-schnell takes none (mu = 0 changes nothing).

SDXL, PixArt and HunyuanDiT are trained on discrete steps, whose sigmas the daemon's word on their noise gives
(`xditd.protocol.noise`).

Either way they are those of ComfyUI's scheduler "simple": it has a table of sigmas for flows too, and takes of it evenly, from the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo
from xditd.protocol.noise import Noise

TABLE = 1000
"""Sigmas of a flow, but for FLUX.1-dev."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What a variant is sampled with where nobody says otherwise.

    Attributes:
        steps: that are usual.
        mu: of a flow's shift; None where there is none.
        table: sigmas of a flow that a schedule takes from, as many as ComfyUI has.
        guidance: that is usual; None where the model takes none.
        scale, shift: a latent as the model has it is (latent as ComfyUI shows it − shift) × scale.
    """

    steps: int
    scale: float
    shift: float = 0.0
    mu: float | None = None
    table: int = TABLE
    guidance: float | None = None


_HABITS = {
    ("flux", "dev"): Habits(mu=1.15, table=10_000, steps=20, guidance=3.5, scale=0.3611, shift=0.1159),
    ("flux", "schnell"): Habits(mu=0.0, steps=4, scale=0.3611, shift=0.1159),
    **{
        # ComfyUI's shift of 3 is exp(mu).
        ("sd3", variant): Habits(mu=math.log(3.0), steps=28, scale=1.5305, shift=0.0609)
        for variant in ("3", "3.5_large", "3.5_medium")
    },
    # Scales of the VAEs that they go with: α has that of SD 1, the others that of SDXL.
    ("sdxl", "eps"): Habits(steps=25, scale=0.13025),
    ("sdxl", "v"): Habits(steps=25, scale=0.13025),
    ("pixart", "alpha"): Habits(steps=20, scale=0.18215),
    ("pixart", "sigma"): Habits(steps=20, scale=0.13025),
    ("hunyuandit", "1.1"): Habits(steps=25, scale=0.13025),
    ("hunyuandit", "1.2"): Habits(steps=25, scale=0.13025),
}


def habits(info: ModelInfo) -> Habits:
    """The habits of a model.

    Raises:
        XditError: `bad_value` for a model that is not sampled, or not by this version.
    """
    habit = _HABITS.get((info.family, info.variant))
    if habit is None:
        there = ", ".join(" ".join(pair) for pair in _HABITS)
        raise XditError(
            Code.BAD_VALUE,
            f"{info.kind}/{info.name} is {info.family} {info.variant}, which `xditctl sample` has no schedule for; "
            f"it has one for {there}.",
        )
    return habit


def sigmas(
    noise: Noise, steps: int, mu: float | None = None, denoise: float = 1.0, table: int = TABLE
) -> tuple[float, ...]:
    """`steps` + 1 descending sigmas, the last of them 0.

    Args:
        noise: what the model takes out of a latent.
        steps: of the loop, at least 1.
        mu: of a flow's shift; None is 0.
        table: of a flow, how many sigmas there are.
        denoise: in (0, 1]: below 1 a schedule of steps / denoise steps is made, and its end taken, as ComfyUI does.

    Raises:
        XditError: `bad_value` for a shift of what is no flow, or more steps than the model has.
    """
    whole = max(steps, int(steps / denoise))
    if noise.predicts == "flow":
        there = [shifted((i + 1) / table, mu or 0.0) for i in range(table)]
    elif mu is not None:
        raise XditError(
            Code.BAD_VALUE, f"A model that predicts {noise.predicts} has no shift; leave --mu out."
        )
    else:
        there = noise.sigmas()
    if whole > len(there):
        raise XditError(
            Code.BAD_VALUE,
            f"{whole} steps are more than the {len(there)} of this model; take fewer steps or more of the denoising.",
        )
    each = len(there) / whole
    return (*(there[-1 - int(i * each)] for i in range(whole - steps, whole)), 0.0)


def known(info: ModelInfo) -> Noise:
    """What a model takes out of a latent.

    Raises:
        XditError: `bad_value` where the daemon does not say.
    """
    if info.noise is None:
        raise XditError(
            Code.BAD_VALUE,
            f"The daemon does not say which noise {info.kind}/{info.name} takes; give --sigmas, or update the daemon.",
        )
    return info.noise


def shifted(sigma: float, mu: float) -> float:
    """A sigma in (0, 1], shifted."""
    return 1 / (1 + (1 / sigma - 1) / math.exp(mu))  # divided through: 1 stays exactly 1
