"""A pipeline's folder, in shards, through the daemon on two ranks: what the makers' files give.

The weights are equal to the bit (tests/models/test_diffusers_folders.py). On a CPU they are computed with where they lie in the
files, and there a matrix product is rounded by where its operands are aligned: hence a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.live.service import Service, serving
from tests.models.diffusers_folders import KINDS, pipeline, save
from xditd.client import Client
from xditd.models.families import load
from xditd.protocol.messages import ModelRef, PlanRequest

TOLERANCE = 1e-5
CPU = torch.device("cpu")
PARTS = {"transformer": KINDS["flux dev"], "vae": KINDS["vae of flux"]}


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The makers' files of both parts, out of the daemon's sight."""
    folder = tmp_path_factory.mktemp("makers")
    for part, kind in PARTS.items():
        kind.make(folder / f"{part}.safetensors")
    return folder


@pytest.fixture(scope="module")
def service(makers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    whole = pipeline(checkpoints / "flux", {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"})
    for part, kind in PARTS.items():
        save(kind, makers / f"{part}.safetensors", whole / part, shard="300KB")
    settings = {
        "devices.cpu_ranks": 2,
        "models.folders": {"checkpoints": [str(checkpoints)]},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


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
    client: Client, makers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, text = torch.randn(1, 16, 9, 10), {"context": torch.randn(1, 7, 64), "pooled": torch.randn(1, 32)}
    guidance = {"guidance": 3.5}
    with client.open_run("checkpoints/flux", PlanRequest(ulysses=2)) as run:
        run.put_conditioning("prompt", text, guidance)
        ours = run.denoise([(x, 0.7, "prompt")])[0]
    network = load("flux", makers / "transformer.safetensors", "transformer", CPU, torch.float32)
    with torch.no_grad():
        theirs = network.predict(x, torch.tensor([0.7]), network.condition(text, guidance))
    error = float((ours - theirs).abs().max() / theirs.std())
    with capsys.disabled():
        print(f"\n  a pipeline's transformer on two ranks: {error:.1e} from the makers' file", end="")
    assert error < TOLERANCE


def test_its_vae_decodes_what_the_makers_file_does(client: Client, makers: Path) -> None:
    latent = torch.randn(1, 16, 6, 6)
    ours = client.decode(ModelRef(kind="checkpoints", name="flux", part="vae"), latent)
    network = load("autoencoder_kl", makers / "vae.safetensors", "vae", CPU, torch.float32)
    with torch.no_grad():
        theirs = network.decode(latent)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() / theirs.std() < TOLERANCE
