"""`xditctl sample` draws by the sigmas of ComfyUI's scheduler "simple", to a rounding of its float32."""

from __future__ import annotations

import comfy.model_base
import comfy.samplers
import comfy.supported_models
import pytest
from comfy.model_base import ModelType

from xditd.catalog.families import TRANSFORMERS
from xditd.cli import schedule
from xditd.models.making import flux_facts
from xditd.models.making_transformers import hunyuandit_facts, pixart_facts, sd3_facts, sdxl_facts

MODELS = {
    ("flux", "dev"): (comfy.supported_models.Flux, ModelType.FLUX, flux_facts()),
    ("flux", "schnell"): (comfy.supported_models.FluxSchnell, ModelType.FLOW, flux_facts(guidance=False)),
    ("sd3", "3.5_large"): (comfy.supported_models.SD3, ModelType.FLOW, sd3_facts()),
    ("sdxl", "eps"): (comfy.supported_models.SDXL, ModelType.EPS, sdxl_facts()),
    ("pixart", "alpha"): (comfy.supported_models.PixArtAlpha, ModelType.EPS, pixart_facts()),
    ("pixart", "sigma"): (comfy.supported_models.PixArtSigma, ModelType.EPS, pixart_facts()),
    ("hunyuandit", "1.2"): (
        comfy.supported_models.HunyuanDiT,
        ModelType.V_PREDICTION,
        hunyuandit_facts(),
    ),
}


@pytest.mark.parametrize("which", MODELS, ids=" ".join)
def test_the_sigmas_are_comfyuis(which: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Steps that divide its table and steps that do not; all of the denoising and part of it."""
    kind, predicts, facts = MODELS[which]
    sampling = comfy.model_base.model_sampling(kind({}), predicts)
    habit = schedule._HABITS[which]
    noise = TRANSFORMERS[which[0]].noise(facts)
    largest = 0.0
    for steps, denoise in ((4, 1.0), (20, 1.0), (28, 1.0), (30, 1.0), (49, 1.0), (11, 0.6)):
        whole = comfy.samplers.calculate_sigmas(sampling, "simple", int(steps / denoise)).double()
        ours = schedule.sigmas(noise, steps, habit.mu, denoise, habit.table)
        theirs = whole[-(steps + 1) :].tolist()
        assert len(ours) == len(theirs)
        largest = max(largest, *(abs(a - b) / (b or 1.0) for a, b in zip(ours, theirs, strict=True)))
    with capsys.disabled():
        print(f"\n  {' '.join(which)}: sigmas {largest:.1e} from ComfyUI's", end="")
    assert largest < 1e-5
