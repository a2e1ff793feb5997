"""What kind of noise a model takes out of a latent, and what it predicts: a rectified flow's, or that of discrete diffusion.

It travels with what a model is (`plans.ModelInfo`), so that whoever samples can make the model's sigmas, and the ranks
compute with the same (`rank.noising`). Pure numbers.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated

from msgspec import Meta, Struct

NEAR_ZERO = 4.8973451890853435e-08
"""What stands for a last ᾱ of zero, as ComfyUI has it: sigma would be infinite."""


class Noise(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A kind of noise.

    "flow" is rectified flow: x = σ·noise + (1 − σ)·latent, with σ from 1 to 0; the network predicts noise − latent.

    "eps" and "v" are diffusion in discrete steps (Ho et al. 2020): x = latent + σ·noise, which the network sees divided by
    √(σ² + 1), at the index of the step whose sigma is nearest; it predicts the noise, or v (Salimans and Ho 2022).
    """

    predicts: str  # "flow", "eps", "v"
    multiplier: float = 1.0  # of a flow: the network's t is sigma times this
    # Of steps: the first β and the last;
    start: float = 0.0
    end: float = 0.0
    by_root: bool = True  # whether the roots of the βs are evenly spaced between; else they are themselves;
    # whether they are rescaled so that the last step has no signal (Lin et al. 2023, algorithm 1);
    zero_snr: bool = False
    steps: Annotated[int, Meta(ge=2, le=65536)] = 1000  # how many there are

    @property
    def highest(self) -> float:
        """The largest sigma."""
        return 1.0 if self.predicts == "flow" else self.sigmas()[-1]

    def sigmas(self) -> list[float]:
        """Of steps, ascending: √((1 − ᾱ)/ᾱ)."""
        low, high = (math.sqrt(self.start), math.sqrt(self.end)) if self.by_root else (self.start, self.end)
        evenly = [low + (high - low) * i / (self.steps - 1) for i in range(self.steps)]
        betas = [value * value for value in evenly] if self.by_root else evenly
        kept = list(itertools.accumulate((1 - beta for beta in betas), lambda before, alpha: before * alpha))
        if self.zero_snr:
            roots = [math.sqrt(value) for value in kept]
            stretch = roots[0] / (roots[0] - roots[-1])
            kept = [((root - roots[-1]) * stretch) ** 2 for root in roots]
            kept[-1] = NEAR_ZERO
        return [math.sqrt((1 - value) / value) for value in kept]
