"""Sigmas and latent scales of the families, against the formulas' other homes."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from tests.cli.stand_in import ScriptedRun
from xditd.cli.schedule import habits, shifted, sigmas
from xditd.protocol.errors import Code, XditError
from xditd.protocol.noise import Noise

FLOW = Noise(predicts="flow")
SDXL = Noise(predicts="eps", start=0.00085, end=0.012)


def test_a_schedule_descends_from_one_to_zero():
    for mu in (0.0, 1.15):
        schedule = sigmas(FLOW, 20, mu)
        assert schedule[0] == 1.0, "a rounding above it would be refused"
        assert schedule[-1] == 0.0
        assert len(schedule) == 21
        assert all(a > b for a, b in itertools.pairwise(schedule))


def test_schnell_is_not_shifted():
    assert sigmas(FLOW, 4, 0.0) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))


def test_dev_is_what_diffusers_makes_of_the_same_mu():
    """Of steps that divide ComfyUI's table: diffusers has no table."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / 25 for i in range(25)], mu=1.15)
    assert sigmas(FLOW, 25, 1.15) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("steps", [4, 20, 28, 30])
@pytest.mark.parametrize(("mu", "table"), [(1.15, 10_000), (math.log(3.0), 1000)])
def test_flows_are_comfyuis_simple(steps, mu, table):
    """ComfyUI picks from a table of shifted timesteps, evenly and downwards (tests/comfy has ComfyUI say so itself)."""
    alpha = math.exp(mu)
    there = [alpha / (alpha + 1 / (i / table) - 1) for i in range(1, table + 1)]
    simple = [there[-(1 + int(x * (table / steps)))] for x in range(steps)]
    assert sigmas(FLOW, steps, mu, table=table) == pytest.approx((*simple, 0.0), abs=1e-12)


def test_sd3_is_shifted_by_three():
    from dataclasses import dataclass

    @dataclass
    class Info:
        family: str = "sd3"
        variant: str = "3.5_large"

    habit = habits(Info())
    assert shifted(0.5, habit.mu) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert (habit.scale, habit.shift, habit.guidance) == (1.5305, 0.0609, None)


@pytest.mark.parametrize(
    ("family", "variant", "scale"),
    [
        ("sdxl", "eps", 0.13025),
        ("sdxl", "v", 0.13025),
        ("pixart", "alpha", 0.18215),
        ("pixart", "sigma", 0.13025),
        ("hunyuandit", "1.1", 0.13025),
        ("hunyuandit", "1.2", 0.13025),
    ],
)
def test_latents_have_the_scale_of_the_vae_that_a_model_goes_with(family, variant, scale):
    """Those of `vae/config.json` in the makers' repositories, and of ComfyUI's latent formats."""
    info = msgspec.structs.replace(ScriptedRun().model, family=family, variant=variant)
    assert (habits(info).scale, habits(info).shift, habits(info).mu) == (scale, 0.0, None)


def test_a_part_of_the_denoising_is_the_end_of_a_longer_schedule():
    assert sigmas(FLOW, 10, 1.15, denoise=0.5) == sigmas(FLOW, 20, 1.15)[-11:]
    assert shifted(1.0, 1.15) == pytest.approx(1.0)


def test_discrete_steps_are_comfyuis_simple():
    """1000 sigmas, of which ComfyUI takes every fiftieth from the last; the last is SDXL's 14.6."""
    table = SDXL.sigmas()
    assert sigmas(SDXL, 20) == (*(table[999 - 50 * i] for i in range(20)), 0.0)
    assert sigmas(SDXL, 20)[0] == pytest.approx(14.6146, abs=1e-3)
    assert sigmas(SDXL, 10, denoise=0.5) == sigmas(SDXL, 20)[-11:]
    assert len(set(sigmas(SDXL, 1000))) == 1001


@pytest.mark.parametrize(
    ("named", "words"), [({"mu": 1.0}, "no shift"), ({"denoise": 0.01}, "more than the 1000")]
)
def test_what_discrete_steps_cannot_be_is_refused(named, words):
    with pytest.raises(XditError, match=words) as caught:
        sigmas(SDXL, 20, **named)
    assert caught.value.code is Code.BAD_VALUE


def test_variants_have_their_habits():
    dev, schnell = habits(ScriptedRun("dev").model), habits(ScriptedRun("schnell").model)
    assert (dev.mu, dev.guidance) == (1.15, 3.5)
    assert (schnell.mu, schnell.guidance, schnell.steps) == (0.0, None, 4)


def test_a_model_that_is_not_sampled_is_refused():
    with pytest.raises(XditError, match="no schedule for") as caught:
        habits(ScriptedRun("tomorrow").model)
    assert caught.value.code is Code.BAD_VALUE
