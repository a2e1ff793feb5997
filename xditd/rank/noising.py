"""Latents with noise, what a network is shown of them, and the x0 that its output tells of: by the kind of noise.

In float32, in the order of operations that ComfyUI's model samplings have, so that results agree to rounding. Knows no
network and no sampler.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from xditd.protocol.noise import Noise

NEAR = 1e-5
"""How near a first sigma must be to the highest to count as it."""


class Noising(Protocol):
    """A kind of noise on a device. A sigma is float32, of no dimensions."""

    highest: float

    def begin(self, noise: torch.Tensor, latent: torch.Tensor | None, sigma: torch.Tensor) -> torch.Tensor:
        """Where a loop begins: a latent (None is zeros) with noise of unit variance."""

    def shown(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x as the network sees it, and its t, float32 of no dimensions."""

    def denoised(self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x0: the latent that x is expected to come from, by the network's output."""

    def end(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The latent where a loop ends at sigma: scaled as if the noise left in it were none of it."""


class Flowing:
    """Rectified flow's."""

    def __init__(self, noise: Noise) -> None:
        self.highest = noise.highest
        self._multiplier = noise.multiplier

    def begin(self, noise: torch.Tensor, latent: torch.Tensor | None, sigma: torch.Tensor) -> torch.Tensor:
        x = sigma * noise
        return x if latent is None else x + (1.0 - sigma) * latent

    def shown(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, sigma * self._multiplier

    def denoised(self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - output * sigma

    def end(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1.0 - sigma)


class Diffusing:
    """That of discrete diffusion.

    Args:
        noise: its description.
        device: where its table is.
    """

    def __init__(self, noise: Noise, device: torch.device) -> None:
        sigmas = torch.tensor(noise.sigmas(), dtype=torch.float64)
        self.highest = float(sigmas[-1])
        self._logs = sigmas.log().float().to(device)
        self._predicts_v = noise.predicts == "v"

    def begin(self, noise: torch.Tensor, latent: torch.Tensor | None, sigma: torch.Tensor) -> torch.Tensor:
        first = float(sigma)
        # All noise: as if the latent's own variance were in it.
        whole = first > self.highest or math.isclose(first, self.highest, rel_tol=NEAR)
        x = noise * (torch.sqrt(1.0 + sigma**2.0) if whole else sigma)
        return x if latent is None else x + latent

    def shown(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / (sigma**2 + 1.0) ** 0.5, (sigma.log() - self._logs).abs().argmin().float()

    def denoised(self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self._predicts_v:
            return x / (sigma**2 + 1.0) - output * sigma / (sigma**2 + 1.0) ** 0.5
        return x - output * sigma

    def end(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x


def noising(noise: Noise, device: torch.device) -> Noising:
    """A kind of noise on a device."""
    return Flowing(noise) if noise.predicts == "flow" else Diffusing(noise, device)
