"""The sampling loop, a step at a time, on explicit sigmas and noise. Knows no network, no ranks and no messages.

For any kind of noise (`noising`) whose sigma says how much of it there is. The state is float32 throughout. The formulas
are those of k-diffusion (MIT, k_diffusion/sampling.py) and of the papers named below, in the order of operations that
ComfyUI's samplers of the same names have, so that results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from xditd.catalog.families.inputs import ROUNDING
from xditd.protocol.errors import Code, XditError
from xditd.protocol.noise import Noise
from xditd.rank.noising import Flowing, Noising

FLOW = Flowing(Noise(predicts="flow"))

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x [B, C, H, W] and sigma (float32, no dimensions) to x0, the latent that x is expected to come from; float32."""


class Sampling:
    """One sampling. `step` is called for 0, 1, … `steps` - 1; then `result` is its outcome.

    Args:
        sampler: a key of SAMPLERS.
        sigmas: descending, steps + 1 of them; the last may be 0.
        noise: of unit variance, float32, on the device.
        latent: to begin from, as noise; None is zeros.
        denoise: the model, guidance included.
        noising: the kind of noise.

    Raises:
        XditError: `bad_value` for an unknown sampler, or sigmas that do not descend from at most the highest to at
            least 0.
    """

    def __init__(
        self,
        sampler: str,
        sigmas: Sequence[float],
        noise: torch.Tensor,
        latent: torch.Tensor | None,
        denoise: Denoise,
        noising: Noising = FLOW,
    ) -> None:
        if sampler not in SAMPLERS:
            raise XditError(
                Code.BAD_VALUE, f"There is no sampler {sampler!r} here; there are {', '.join(SAMPLERS)}."
            )
        most = noising.highest * (1 + ROUNDING)
        falling = all(a > b for a, b in pairwise(sigmas))
        if len(sigmas) < 2 or not falling or sigmas[0] > most or sigmas[-1] < 0:
            raise XditError(
                Code.BAD_VALUE,
                f"Sigmas of this model must be two or more, falling, from at most {noising.highest:g} to at least 0.",
            )
        self.steps = len(sigmas) - 1
        self.next = 0
        self.denoise = denoise
        # On the device, though small: a division by a number on the host is a multiplication there, and rounds anew.
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32).to(noise.device, non_blocking=True)
        self.ends_at_zero = sigmas[-1] == 0
        self.noising = noising
        self.x = noising.begin(noise, latent, self.sigmas[0])
        self.before: torch.Tensor | None = None  # x0 of the step before, for multistep samplers
        self._advance = SAMPLERS[sampler]

    def step(self, number: int) -> torch.Tensor:
        """From sigmas[number] to sigmas[number + 1].

        Returns:
            x0 as this step saw it, float32.

        Raises:
            XditError: `bad_value` where it is not the next step's turn.
        """
        if number != self.next or number >= self.steps:
            raise XditError(
                Code.BAD_VALUE, f"Step {number} of {self.steps} is not the next one, which is {self.next}."
            )
        denoised = self._advance(self, number)
        self.before = denoised
        self.next += 1
        return denoised

    @property
    def done(self) -> bool:
        return self.next == self.steps

    def is_last(self, number: int) -> bool:
        """Whether that step ends at sigma 0, where x is x0."""
        return self.ends_at_zero and number == self.steps - 1

    def result(self) -> torch.Tensor:
        """The latent, float32; where the last sigma is not 0, scaled as if the noise left in it were none of it."""
        return self.noising.end(self.x, self.sigmas[-1])


def euler(loop: Sampling, i: int) -> torch.Tensor:
    """Euler's method on dx/dσ = (x − x0)/σ (Karras et al. 2022, algorithm 2 without its correction)."""
    sigma, onward = loop.sigmas[i], loop.sigmas[i + 1]
    denoised = loop.denoise(loop.x, sigma)
    slope = (loop.x - denoised) / sigma
    loop.x = loop.x + slope * (onward - sigma)
    return denoised


def heun(loop: Sampling, i: int) -> torch.Tensor:
    """Heun's method (Karras et al. 2022, algorithm 2 without noise): two model calls, one in the step to 0."""
    if loop.is_last(i):
        return euler(loop, i)
    sigma, onward = loop.sigmas[i], loop.sigmas[i + 1]
    denoised = loop.denoise(loop.x, sigma)
    slope = (loop.x - denoised) / sigma
    ahead = loop.x + slope * (onward - sigma)
    slope_ahead = (ahead - loop.denoise(ahead, onward)) / onward
    loop.x = loop.x + (slope + slope_ahead) / 2 * (onward - sigma)
    return denoised


def dpmpp_2m(loop: Sampling, i: int) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) over t = −log σ, as k-diffusion has it, for flow as well."""
    sigma, onward = loop.sigmas[i], loop.sigmas[i + 1]
    denoised = loop.denoise(loop.x, sigma)
    if loop.is_last(i):
        loop.x = denoised
        return denoised
    t, t_next = -sigma.log(), -onward.log()
    h = t_next - t
    target = denoised
    if loop.before is not None:
        r = (t + loop.sigmas[i - 1].log()) / h
        target = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * loop.before
    loop.x = ((-t_next).exp() / (-t).exp()) * loop.x - (-h).expm1() * target
    return denoised


SAMPLERS: dict[str, Callable[[Sampling, int], torch.Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    # Deterministic DDIM (Song et al. 2020, equation 13) is Euler's method in this frame, and is what ComfyUI runs
    # under this name; there it differs in how the masked part of an inpainting is noised, which is the client's.
    "ddim": euler,
}
"""By ComfyUI's names. Each advances the loop by one step and returns x0."""
