"""Runs with LoRAs on real ranks: each gets the picture of weights merged by hand, and leaves the others theirs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.live.conftest import FLUX
from tests.live.service import Service, serving
from tests.live.test_image import MODEL, SIGMAS, given, noise
from tests.rank.reference import Reference, error, euler
from xditd.client import Client
from xditd.models.making import flux_facts
from xditd.models.making_loras import make_lora
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import PlanRequest

PLAN = PlanRequest(ulysses=2)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    make_lora(folder / "ink.safetensors", "flux", flux_facts(**FLUX), "kohya", seed=1)
    make_lora(folder / "oil.safetensors", "flux", flux_facts(**FLUX), "bfl-peft", seed=2)
    save_file({"lora_unet_what.lora_up.weight": torch.ones(8, 4), "lora_unet_what.lora_down.weight": torch.ones(4, 8)}, folder / "other.safetensors")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path, folder: Path) -> Iterator[Service]:
    settings = {
        "devices.cpu_ranks": 2,
        "models.folders": {"diffusion_models": [str(models / "diffusion_models")], "loras": [str(folder)]},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def merged(models: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Flux in one process, from a file that LoRAs were merged into by hand."""

    def reference(*loras: tuple[str, float]) -> Reference:
        weights = load_file(models / "diffusion_models" / "flux.safetensors")
        for name, strength in loras:
            pairs = load_file(folder / name)
            for key, up, down, scale in (
                ("lora_unet_{_}", ".lora_up.weight", ".lora_down.weight", 2.0 / 4),
                ("diffusion_model.{.}", ".lora_B.weight", ".lora_A.weight", 1.0),
            ):
                for weight in [weight for weight in weights if weight.endswith(".weight")]:
                    plain = weight.removesuffix(".weight")
                    module = key.replace("{.}", plain).replace("{_}", plain.replace(".", "_"))
                    if module + up in pairs:
                        change = pairs[module + up].double() @ pairs[module + down].double()
                        weights[weight] = (weights[weight].double() + strength * scale * change).float()
        path = tmp_path_factory.mktemp("m") / "merged.safetensors"
        save_file(weights, path)
        return Reference(path, flux_facts(**FLUX))

    return reference


def predict(client: Client, *lora: tuple[str, float]) -> torch.Tensor:
    with client.open_run(MODEL, PLAN, lora=lora) as run:
        run.put_conditioning("prompt", given(77), {"guidance": 3.5})
        return run.denoise([(noise(18, 22), 0.7, "prompt")])[0].clone()


@pytest.mark.parametrize(
    "plan", [PLAN, pytest.param(PlanRequest(tensor=2), marks=pytest.mark.soak)], ids=["ulysses", "tensor"]
)
def test_two_ranks_compute_what_weights_merged_by_hand_give(client: Client, merged, capsys, plan) -> None:
    x, both = noise(18, 22), (("ink.safetensors", 0.8), ("oil.safetensors", -0.5))
    reference = merged(*both)
    with client.open_run(MODEL, plan, lora=both) as run:
        assert [(m.name, m.strength, m.matched == m.modules) for m in run.lora] == [
            (*lora, True) for lora in both
        ]
        run.put_conditioning("prompt", given(77), {"guidance": 3.5})
        (prediction,) = run.denoise([(x, 0.7, "prompt")])
        latent = run.sample(x, SIGMAS, "prompt")
    step = error(prediction, reference.predict(x, 0.7, **given(77), guidance=3.5))
    whole = error(latent, euler(lambda x, t: reference.predict(x, t, **given(77), guidance=3.5), SIGMAS, x))
    with capsys.disabled():
        print(
            f"\n  two LoRAs, ulysses {plan.ulysses} tensor {plan.tensor}: denoise {step:.1e}, sample {whole:.1e} from weights merged by hand"
        )
    assert max(step, whole) < TOLERANCE
    assert error(prediction, merged().predict(x, 0.7, **given(77), guidance=3.5)) > 100 * TOLERANCE


@pytest.mark.soak
def test_each_stage_of_a_pipeline_merges_what_is_its_own(client: Client, merged, capsys) -> None:
    x, both = noise(18, 22), (("ink.safetensors", 0.8), ("oil.safetensors", -0.5))
    reference, plan = merged(*both), PlanRequest(strategy="PipeFusion")
    plain = {}
    for lora in ((), both, ()):
        with client.open_run(MODEL, plan, lora=lora) as run:
            run.put_conditioning("prompt", given(77), {"guidance": 3.5})
            latent = run.sample(x, SIGMAS, "prompt", warmup=len(SIGMAS) - 1)
        assert torch.equal(plain.setdefault(lora, latent), latent)
    expected = euler(lambda x, t: reference.predict(x, t, **given(77), guidance=3.5), SIGMAS, x)
    with capsys.disabled():
        print(
            f"\n  two LoRAs, pipefusion 2: sample {error(plain[both], expected):.1e} from weights merged by hand"
        )
    assert error(plain[both], expected) < TOLERANCE
    assert error(plain[()], expected) > 100 * TOLERANCE


def test_on_off_on_is_where_it_was_and_nothing_is_loaded_again(client: Client) -> None:
    ink = ("ink.safetensors", 0.8)
    plain, with_it = predict(client), predict(client, ink)
    weaker = predict(client, ("ink.safetensors", 0.3))
    assert torch.equal(predict(client), plain)
    assert torch.equal(predict(client, ink), with_it)
    assert not torch.equal(plain, with_it)
    assert not torch.equal(weaker, with_it)
    assert {group.generation for group in client.status().groups} == {1}


def test_a_run_with_other_loras_waits_for_the_group(service: Service, client: Client) -> None:
    heard = []
    with service.client() as other, client.open_run(MODEL, PLAN, lora=[("ink.safetensors", 0.8)]):
        with pytest.raises(XditError) as caught:
            other.open_run(MODEL, PLAN, timeout=1.0, on_event=heard.append)
        assert caught.value.code == Code.TIMEOUT
        assert heard[0].phase == "waiting"
        with other.open_run(MODEL, PLAN, lora=[("ink.safetensors", 0.8)], timeout=30):
            pass
    with client.open_run(MODEL, PLAN, timeout=30):
        pass


def test_what_does_not_fit_is_refused_before_any_rank_is_asked(client: Client) -> None:
    client.load(MODEL, PLAN)
    turns = client.status().groups[0].turns
    for name, code in (
        ("other.safetensors", Code.LORA_MISMATCH),
        ("gone.safetensors", Code.MODEL_NOT_VISIBLE),
        ("../ink.safetensors", Code.BAD_VALUE),
    ):
        for ask in (client.open_run, client.load):
            with pytest.raises(XditError) as caught:
                ask(MODEL, PLAN, lora=[(name, 1.0)])
            assert caught.value.code == code
    loaded = client.load(MODEL, PLAN, lora=["ink.safetensors"])
    assert loaded.warm
    assert loaded.lora[0].matched == loaded.lora[0].modules > 10
    assert client.status().groups[0].turns == turns


def test_xditctl_draws_with_a_lora(service: Service, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "xditd.cli.xditctl", "sample", MODEL, "--endpoint", service.endpoint),
        *("--random-conditioning", "--ulysses", "2", "--steps", "1", "--size", "64"),
        *(
            "--lora",
            "ink.safetensors:0.8",
            "--lora",
            "oil.safetensors",
            "--save-latent",
            tmp_path / "l.safetensors",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ink.safetensors × 0.8: 36 of 36 modules" in done.stdout
    assert "oil.safetensors × 1: 36 of 36 modules" in done.stdout
    assert (tmp_path / "l.safetensors").exists()
    assert "With ink.safetensors × 0.8: 36 of 36 modules." in service.said()
