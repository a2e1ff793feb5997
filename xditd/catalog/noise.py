"""What kind of noise a model takes out of a latent, and what it predicts: a rectified flow's, or that of discrete diffusion.

Pure numbers; `rank.noising` computes with them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

NEAR_ZERO = 4.8973451890853435e-08
"""What stands for a last ᾱ of zero, as ComfyUI has it: sigma would be infinite."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Rectified flow: x = σ·noise + (1 − σ)·latent, with σ from 1 to 0; the network predicts noise − latent.

    Attributes:
        multiplier: the network's t is sigma times this.
    """

    multiplier: float = 1.0

    @property
    def highest(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Diffusion:
    """Diffusion in discrete steps (Ho et al. 2020): x = latent + σ·noise, which the network sees divided by √(σ² + 1), at
    the index of the step whose sigma is nearest.

    Attributes:
        predicts: "eps", the noise, or "v" (Salimans and Ho 2022).
        start, end: the first β and the last.
        by_root: whether the roots of the βs are evenly spaced between; else they are themselves.
        zero_snr: whether they are rescaled so that the last step has no signal (Lin et al. 2023, algorithm 1).
        steps: how many there are.
    """

    predicts: Literal["eps", "v"]
    start: float
    end: float
    by_root: bool = True
    zero_snr: bool = False
    steps: int = 1000

    @property
    def highest(self) -> float:
        return self.sigmas()[-1]

    def sigmas(self) -> list[float]:
        """By step, ascending: √((1 − ᾱ)/ᾱ)."""
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


Noise = Flow | Diffusion
