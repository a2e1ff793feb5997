"""A client samples Flux on several ranks, from ComfyUI's files, and gets a picture: the same as from one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.live.conftest import FLUX, VAE
from tests.live.service import Service, serving
from tests.rank.reference import Reference, error, euler
from xditd.models.making import flux_facts, vae_facts
from xditd.models.vae.config import config as vae_config
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

MODEL, AE = "diffusion_models/flux.safetensors", "vae/ae.safetensors"
SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path
) -> Iterator[Service]:
    settings = {
        "devices.cpu_ranks": 4,
        "models.folders": {kind: [str(models / kind)] for kind in ("diffusion_models", "vae")},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


@pytest.fixture(scope="module")
def reference(models: Path) -> Reference:
    return Reference(models / "diffusion_models" / "flux.safetensors", flux_facts(**FLUX))


def given(text: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(text)
    return {
        "context": torch.randn(1, text, FLUX["context_width"], generator=generator),
        "pooled": torch.randn(1, FLUX["pooled_width"], generator=generator),
    }


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize(
    ("plan", "text", "size"),
    [
        (PlanRequest(ulysses=2), 77, (18, 22)),
        pytest.param(PlanRequest(ring=2), 15, (21, 13), marks=pytest.mark.soak),
        pytest.param(PlanRequest(ulysses=2, shard=True), 15, (21, 13), marks=pytest.mark.soak),
        pytest.param(PlanRequest(ulysses=2, ring=2), 15, (21, 13), marks=pytest.mark.soak),
        pytest.param(
            PlanRequest(strategy="Tensor", devices=("0", "1")), 15, (21, 13), marks=pytest.mark.soak
        ),
    ],
    ids=["ulysses2", "ring2", "ulysses2-sharded", "ulysses2×ring2", "tensor2"],
)
def test_several_ranks_give_the_picture_of_one_process(service, reference, plan, text, size, capsys):
    conditioning, start = given(text), noise(*size)
    with service.client() as client, client.open_run(MODEL, plan) as run:
        run.put_conditioning("prompt", conditioning, {"guidance": 3.5})
        (prediction,) = run.denoise([(start, 0.7, "prompt")])
        latent = run.sample(start, SIGMAS, "prompt")
    expected = reference.predict(start, 0.7, **conditioning, guidance=3.5)
    expected_latent = euler(lambda x, t: reference.predict(x, t, **conditioning, guidance=3.5), SIGMAS, start)
    step, whole = error(prediction, expected), error(latent, expected_latent)
    with capsys.disabled():
        print(
            f"\n  through the daemon, {len(run.plan.devices)} ranks, text {text}, {size[0]}×{size[1]}: ",
            end="",
        )
        print(f"denoise {step:.1e}, sample {whole:.1e} from one process")
    assert max(step, whole) < TOLERANCE


def test_progress_comes_step_by_step_with_a_preview_that_ends_in_the_result(service):
    seen = []
    with service.client() as client, client.open_run(MODEL, PlanRequest(ulysses=2)) as run:
        run.put_conditioning("prompt", given(77))
        latent = run.sample(noise(18, 22), SIGMAS, "prompt", callback=lambda *step: seen.append(step))
    assert [(step, total, sigma) for step, total, sigma, _ in seen] == [
        (1, 4, 0.8),
        (2, 4, 0.5),
        (3, 4, 0.2),
        (4, 4, 0.0),
    ]
    torch.testing.assert_close(seen[-1][3], latent)  # at sigma 0, x is x0
    assert not torch.equal(seen[0][3], seen[1][3])


def test_a_client_without_shared_memory_gets_the_same_bits(service):
    def sampled(shared_memory: bool) -> list[torch.Tensor]:
        previews = []
        with (
            service.client(shared_memory=shared_memory) as client,
            client.open_run(MODEL, PlanRequest(ulysses=2)) as run,
        ):
            run.put_conditioning("prompt", given(77))
            (step,) = run.denoise([(noise(18, 22), 0.7, "prompt")])
            latent = run.sample(
                noise(18, 22), SIGMAS, "prompt", callback=lambda *step: previews.append(step[3])
            )
            return [step, latent, *previews]

    for mine, theirs in zip(sampled(True), sampled(False), strict=True):
        assert torch.equal(mine, theirs)


def test_the_vae_is_a_model_like_any_other(service, models):
    from diffusers import AutoencoderKL

    latent = noise(6, 7)
    with service.client() as client:
        image = client.decode(AE, latent)
        back = client.encode(AE, image)
    plain = AutoencoderKL(**vae_config(vae_facts(**VAE))).eval()
    from xditd.catalog.layouts.autoencoder_kl import pieces
    from xditd.models.filling import fill
    from xditd.models.reading import WeightFile

    fill(
        plain,
        pieces(vae_facts(**VAE)),
        WeightFile(models / "vae" / "ae.safetensors"),
        torch.device("cpu"),
        torch.float32,
    )
    with torch.no_grad():
        pixels = plain.decode(latent).sample
        expected = (pixels.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
        expected_back = plain.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert image.shape == (1, 12, 14, 3)
    assert torch.equal(image, expected)
    assert torch.equal(back, expected_back)


def test_several_devices_share_a_picture_and_one_has_it_in_tiles(service):
    latent = noise(37, 20)
    with service.client() as client:
        whole = client.decode(AE, latent)
        with client.open_run(AE, PlanRequest(devices=("0", "1"))) as run:
            assert (run.plan.patch, run.plan.devices) == (2, ("cpu:0", "cpu:1"))
            assert error(run.decode(latent), whole) < TOLERANCE
            assert error(run.encode(whole), client.encode(AE, whole)) < TOLERANCE
            with pytest.raises(XditError, match="Tiles are computed by one device"):
                run.decode(latent, tile=16)
        with pytest.raises(XditError, match="16 would work"):
            client.decode(AE, latent, tile=12)
        tiled = client.decode(AE, latent, tile=32)
        assert tiled.shape == whole.shape
        assert not torch.equal(tiled, whole), "tiles are approximate"


def test_two_items_of_a_step_are_answered_together(service, reference):
    texts = {"positive": given(77), "negative": given(15)}
    x = noise(18, 22)
    with service.client() as client, client.open_run(MODEL, PlanRequest(ulysses=2)) as run:
        for key, tensors in texts.items():
            run.put_conditioning(key, tensors, {"guidance": 3.5})
        predictions = run.denoise([(x, 0.6, key) for key in texts])
    for prediction, tensors in zip(predictions, texts.values(), strict=True):
        assert error(prediction, reference.predict(x, 0.6, **tensors, guidance=3.5)) < TOLERANCE
