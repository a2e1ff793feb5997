"""A pipeline's folder, in shards, through the daemon on two ranks: what the makers' files give.

The weights are equal to the bit (tests/models/test_diffusers_folders.py). On a CPU they are computed with where they lie in the
files, and there a matrix product is rounded by where its operands are aligned: hence a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.live.service import Service
from tests.models.diffusers_folders import KINDS, pipeline, save
from xditd.client import Client
from xditd.protocol.messages import ModelRef, PlanRequest

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = tmp_path_factory.mktemp("models")
    whole = models / "checkpoints" / "flux"
    for kind, below, folder in (
        ("flux dev", "transformer", "diffusion_models"),
        ("vae of flux", "vae", "vae"),
    ):
        (models / folder).mkdir()
        makers = KINDS[kind].make(models / folder / "makers.safetensors")
        save(KINDS[kind], makers, whole / below, shard="300KB")
    pipeline(whole, {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"})
    kinds = ("checkpoints", "diffusion_models", "vae")
    settings = {
        "devices.kind": "cpu",
        "devices.cpu_ranks": 2,
        "models.folders": {kind: [str(models / kind)] for kind in kinds},
    }
    service = Service(tmp_path_factory.mktemp("s"), settings)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


def test_a_pipeline_is_listed_once_for_each_part(client: Client) -> None:
    listed = client.models("checkpoints")
    assert {(info.name, info.part, info.family) for info in listed.models} == {
        ("flux", "transformer", "flux"),
        ("flux", "vae", "autoencoder_kl"),
    }
    assert not listed.skipped


def test_its_transformer_predicts_on_two_ranks_what_the_makers_file_does(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    x, context, pooled = torch.randn(1, 16, 9, 10), torch.randn(1, 7, 64), torch.randn(1, 32)

    def predicted(model: str) -> torch.Tensor:
        with client.open_run(model, PlanRequest(ulysses=2)) as run:
            run.put_conditioning("prompt", {"context": context, "pooled": pooled}, {"guidance": 3.5})
            return run.denoise([(x, 0.7, "prompt")])[0].clone()

    theirs = predicted("diffusion_models/makers.safetensors")
    assert theirs.std() > 0.01
    error = float((predicted("checkpoints/flux") - theirs).abs().max() / theirs.std())
    with capsys.disabled():
        print(f"\n  a pipeline's transformer on two ranks: {error:.1e} from the makers' file", end="")
    assert error < TOLERANCE


def test_its_vae_decodes_what_the_makers_file_does(client: Client) -> None:
    latent = torch.randn(1, 16, 6, 6)
    theirs = client.decode("vae/makers.safetensors", latent)
    ours = client.decode(ModelRef(kind="checkpoints", name="flux", part="vae"), latent)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() / theirs.std() < TOLERANCE
