"""The sampling loops against formulas written anew in float64, and against diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from xditd.protocol.errors import XditError
from xditd.rank.sampling import SAMPLERS, Sampling

STEPS = 20


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    """A flow schedule from 1 to 0, as float32 has it."""
    times = [1 - i / steps for i in range(steps + 1)]
    return [float(torch.tensor(shift * t / (1 + (shift - 1) * t))) for t in times]


def velocity(x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """A smooth field with no meaning, in the dtype of x."""
    return torch.sin(2 * x + sigma) + 0.5 * x * sigma


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x - velocity(x, sigma) * sigma


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def run(sampler: str, sigmas: list[float], latent: torch.Tensor | None = None) -> torch.Tensor:
    loop = Sampling(sampler, sigmas, noise(), latent, denoise)
    for i in range(loop.steps):
        loop.step(i)
    assert loop.done
    return loop.result()


# ------------------------------------------------------------------------------- the same, written for one number


def by_euler(x: torch.Tensor, s: list[float]) -> torch.Tensor:
    for a, b in pairwise(s):
        x = x + velocity(x, a) * (b - a)
    return x


def by_heun(x: torch.Tensor, s: list[float]) -> torch.Tensor:
    for a, b in pairwise(s):
        v = velocity(x, a)
        ahead = x + v * (b - a)
        x = ahead if b == 0 else x + (v + velocity(ahead, b)) / 2 * (b - a)
    return x


def by_dpmpp_2m(x: torch.Tensor, s: list[float]) -> torch.Tensor:
    """With λ = −log σ: x' = (σ'/σ)·x + (1 − σ'/σ)·D, and D extrapolated from the last two x0 by their λ."""
    last: tuple[float, torch.Tensor] | None = None
    for a, b in pairwise(s):
        x0 = x - velocity(x, a) * a
        d = x0
        if b > 0 and last is not None:
            h, h_last = math.log(a / b), math.log(last[0] / a)
            d = x0 + (x0 - last[1]) * h / (2 * h_last)
        x = (b / a) * x + (1 - b / a) * d
        last = (a, x0)
    return x


REFERENCES: dict[str, Callable[[torch.Tensor, list[float]], torch.Tensor]] = {
    "euler": by_euler,
    "heun": by_heun,
    "dpmpp_2m": by_dpmpp_2m,
    "ddim": by_euler,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_computes_its_formula(sampler: str) -> None:
    sigmas = shifted(STEPS)
    expected = REFERENCES[sampler](noise().double() * sigmas[0], sigmas)
    assert (run(sampler, sigmas) - expected).abs().max() < 5e-6 * expected.std()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_part_of_a_schedule_begins_from_the_latent_and_rescales_what_is_left(sampler: str) -> None:
    """A refining pass that stops early: x = σ·noise + (1 − σ)·latent at its beginning, /(1 − σ) at its end."""
    sigmas = shifted(STEPS)[8:15]
    latent = torch.linspace(-1, 1, noise().numel()).view(noise().shape)
    begin = sigmas[0] * noise().double() + (1 - sigmas[0]) * latent.double()
    expected = REFERENCES[sampler](begin, sigmas) / (1 - sigmas[-1])
    assert (run(sampler, sigmas, latent) - expected).abs().max() < 5e-6 * expected.std()


def test_euler_is_diffusers_flow_match_euler() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    sigmas = shifted(STEPS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1], device="cpu")
    x = noise()
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(velocity(x, sigma), t, x, return_dict=False)[0]
    assert (run("euler", sigmas) - x).abs().max() < 2e-6


def test_a_second_order_sampler_is_nearer_the_truth() -> None:
    """Against 2,000 steps, down to the sigma where λ takes leaps: their corrections point the right way."""
    truth = by_heun(noise().double(), [float(s) for s in torch.linspace(1, 0.3, 2001)])
    coarse = [float(s) for s in torch.linspace(1, 0.3, STEPS + 1)]
    errors = {name: float((run(name, coarse) * 0.7 - truth).abs().mean()) for name in SAMPLERS}
    assert errors["heun"] < errors["euler"] / 10
    assert errors["dpmpp_2m"] < errors["euler"] / 2


def test_x0_is_what_the_step_saw() -> None:
    loop = Sampling("heun", [0.9, 0.5, 0.0], noise(), None, denoise)
    first = loop.step(0)
    assert torch.equal(first, denoise(torch.tensor(0.9) * noise(), torch.tensor(0.9)))
    assert torch.allclose(loop.step(1), loop.result(), atol=1e-6)  # the step to 0 ends where x0 was


def test_steps_come_in_order_and_once() -> None:
    loop = Sampling("euler", [1.0, 0.5, 0.0], noise(), None, denoise)
    with pytest.raises(XditError, match="Step 1 of 2 is not the next one, which is 0"):
        loop.step(1)
    loop.step(0)
    loop.step(1)
    with pytest.raises(XditError, match="Step 2 of 2"):
        loop.step(2)


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.0], [0.2, 0.8], [1.5, 0.0], [1.0, -0.1]])
def test_sigmas_that_do_not_fall_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(XditError, match="falling"):
        Sampling("euler", sigmas, noise(), None, denoise)


def test_a_sampler_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(XditError, match="euler, heun, dpmpp_2m, ddim"):
        Sampling("lcm", [1.0, 0.0], noise(), None, denoise)
