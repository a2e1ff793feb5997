"""The sampling loops against formulas written anew in float64, and against diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from xditd.catalog.families import hunyuandit, pixart, sdxl
from xditd.protocol import samplers
from xditd.protocol.errors import XditError
from xditd.protocol.noise import Noise
from xditd.rank.noising import noising
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


def test_the_ranks_have_every_sampler_that_a_client_may_ask_for():
    assert tuple(SAMPLERS) == samplers.SAMPLERS
    assert set(samplers.PIPELINED) < set(SAMPLERS)


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


# ------------------------------------------------------------------------------------------- noise of discrete steps

KINDS = {
    "sdxl": (sdxl.noise({"v": 0, "zsnr": 0}), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "sdxl v, zero snr": (
        sdxl.noise({"v": 1, "zsnr": 1}),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    ),
    "pixart": (pixart.noise({}), {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    "hunyuandit 1.2": (
        hunyuandit.noise({"sizes": 0}),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.018},
    ),
    "hunyuandit 1.1": (
        hunyuandit.noise({"sizes": 1}),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03},
    ),
}  # fmt: skip
CPU = torch.device("cpu")


def of_x0(x0: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, predicts: str) -> torch.Tensor:
    """What a network would say of x that comes from x0: eps, or v = √ᾱ·eps − √(1 − ᾱ)·x0."""
    eps, root = (x - x0) / sigma, (1 + sigma**2) ** 0.5
    return eps if predicts == "eps" else (eps - sigma * x0) / root


@pytest.mark.parametrize(("kind", "told"), KINDS.values(), ids=KINDS)
def test_the_table_of_sigmas_is_diffusers(kind: Noise, told: dict[str, Any]) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    kept = DDIMScheduler(num_train_timesteps=1000, **told).alphas_cumprod.double()
    ours = torch.tensor(kind.sigmas(), dtype=torch.float64)
    theirs = ((1 - kept) / kept) ** 0.5
    last = -1 if kind.zero_snr else None  # there theirs is infinite
    assert torch.allclose(ours[:last], theirs[:last], rtol=2e-3 if kind.zero_snr else 1e-4)
    assert kind.highest == ours[-1] == ours.max()
    assert kind.highest == pytest.approx(4518.76, abs=0.01) if kind.zero_snr else kind.highest < 500


@pytest.mark.parametrize(("kind", "told"), KINDS.values(), ids=KINDS)
def test_a_network_is_asked_at_the_step_whose_sigma_is_nearest(kind: Noise, told: dict[str, Any]) -> None:
    of = noising(kind, CPU)
    for step in (0, 1, 500, 998, 999):
        sigma = torch.tensor(kind.sigmas()[step], dtype=torch.float32)
        for near in (sigma, sigma * 1.0001):
            x, t = of.shown(noise(), near)
            assert (t.dtype, float(t)) == (torch.float32, step)
            assert torch.allclose(x, noise() / (1 + near**2).sqrt())


@pytest.mark.parametrize(("kind", "told"), KINDS.values(), ids=KINDS)
def test_what_a_network_predicts_tells_of_the_latent(kind: Noise, told: dict[str, Any]) -> None:
    of, x0 = noising(kind, CPU), torch.linspace(-1, 1, noise().numel()).view(noise().shape)
    for sigma in (torch.tensor(0.1), torch.tensor(3.0)):
        x = x0 + sigma * noise()
        assert torch.allclose(of.denoised(x, of_x0(x0, x, sigma, kind.predicts), sigma), x0, atol=1e-5)


def test_a_loop_of_discrete_steps_begins_with_noise_of_its_sigma_and_ends_as_it_is() -> None:
    kind = KINDS["sdxl"][0]
    of, latent = noising(kind, CPU), torch.linspace(-1, 1, noise().numel()).view(noise().shape)
    low, highest = torch.tensor(3.0), torch.tensor(kind.highest)
    assert torch.equal(of.begin(noise(), latent, low), noise() * 3.0 + latent)
    # From the top on, noise has the variance of a latent with noise: nothing of the latent is left to tell.
    assert torch.allclose(of.begin(noise(), None, highest), noise() * (1 + highest**2).sqrt())
    assert torch.equal(of.end(latent, torch.tensor(0.5)), latent)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_the_latent_that_a_perfect_network_knows(sampler: str) -> None:
    for kind, _ in KINDS.values():
        of, x0 = noising(kind, CPU), torch.linspace(-1, 1, noise().numel()).view(noise().shape)

        def perfect(x: torch.Tensor, sigma: torch.Tensor, of=of, x0=x0, kind=kind) -> torch.Tensor:
            return of.denoised(x, of_x0(x0, x, sigma, kind.predicts), sigma)

        sigmas = [*(kind.sigmas()[step] for step in (999, 700, 400, 100)), 0.0]
        loop = Sampling(sampler, sigmas, noise(), None, perfect, of)
        for i in range(loop.steps):
            loop.step(i)
        assert (loop.result() - x0).abs().max() < 1e-3
    with pytest.raises(XditError, match=r"at most 14\.6"):
        Sampling(sampler, [15.0, 0.0], noise(), None, denoise, noising(KINDS["sdxl"][0], CPU))
