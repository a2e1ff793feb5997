"""`xditctl sample` draws with every family, from a schedule that it makes of what the daemon says of the model's noise.

Flux is drawn with in test_loras; here are the others, each held against plain diffusers in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.live.service import Service, serving
from tests.rank.families import CASES
from tests.rank.reference import descend, error, slope
from xditd.cli.drawing import random_conditioning
from xditd.cli.schedule import habits, known, sigmas
from xditd.cli.xditctl import main
from xditd.client import files

DRAWN = ("sd3", "sdxl", "pixart_sigma", "hunyuandit_1.1")
STEPS, SIDE, SEED = 3, 36, 5  # a side of 36 is more than the 32 that PixArt needs
TOLERANCE = 5e-5  # from a sigma of 419.9, three steps make more of a rounding


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = tmp_path_factory.mktemp("models")
    for name in DRAWN:
        CASES[name].make(models / f"{name}.safetensors")
    settings = {"models.folders": {"diffusion_models": [str(models)]}}
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        service.models = models
        yield service


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.soak] if n in ("sd3", "pixart_sigma") else []) for n in DRAWN]
)
def test_a_family_is_drawn_with_as_plain_diffusers_draws(
    service: Service, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved = f"diffusion_models/{name}.safetensors", tmp_path / "l.safetensors"
    done = CliRunner().invoke(
        main,
        f"sample {model} --endpoint {service.endpoint} --random-conditioning --steps {STEPS} --size {8 * SIDE} "
        f"--seed {SEED} --save-latent {saved}".split(),
    )
    assert done.exit_code == 0, done.output
    drawn = load_file(saved)["latent_tensor"]

    with service.client() as client:
        info = next(info for info in client.models().models if info.name == f"{name}.safetensors")
    case = CASES[name]
    schedule = sigmas(known(info), STEPS, habits(info).mu)
    predict = case.reference(service.models / f"{name}.safetensors")
    conditioning = random_conditioning(info, SEED)
    if info.family == "hunyuandit":  # text throughout, which the daemon takes for granted
        conditioning |= {f"mask{key[7:]}": torch.ones(text.shape[:2]) for key, text in conditioning.items()}
    x = torch.as_tensor(files.noise((1, case.channels, SIDE, SIDE), SEED))
    velocity = partial(slope, case.predicts, known(info).sigmas(), partial(predict, given=conditioning))
    x = x * (1.0 if case.predicts == "flow" else (1 + schedule[0] ** 2) ** 0.5)
    x = descend(velocity, schedule, x)
    expected = x / habits(info).scale + habits(info).shift
    figure = error(drawn, expected)
    with capsys.disabled():
        print(
            f"\n  xditctl sample, {name}, {STEPS} steps from {schedule[0]:.4g}: {figure:.1e} from plain diffusers",
            end="",
        )
    assert figure < TOLERANCE
