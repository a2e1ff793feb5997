"""One rank with a VAE: what it decodes and encodes is what diffusers does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from tests.rank.ranks import Ranks, framed, running
from xditd.catalog.layouts.autoencoder_kl import pieces
from xditd.models.making import make_vae, vae_facts
from xditd.models.reading import WeightFile, fill
from xditd.models.vae.config import config
from xditd.protocol import orders


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("v")
    path = make_vae(folder / "vae.safetensors")
    with running(folder, path=path, family="autoencoder_kl", part="vae") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> AutoencoderKL:
    facts = vae_facts()
    module = AutoencoderKL(**config(facts))
    fill(module, pieces(facts), WeightFile(ranks.specs[0].path), torch.device("cpu"), torch.float32)
    return module


def test_an_odd_latent_is_decoded_into_its_slot(ranks: Ranks, plain: AutoencoderKL) -> None:
    latent = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    slots = ranks.slots()
    out = slots.take((1, 40, 56, 3), torch.float32)
    done, _ = ranks.turn(orders.TurnDecode(order=1, run=1, latent=slots.put(latent), clamp=True, out=out))
    assert done.outputs == (out,)
    with torch.no_grad():
        expected = ((plain.decode(latent).sample + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert torch.equal(slots.view(out), expected)
    assert 0.05 < expected.std() < 0.5  # a picture, not a grey or a saturated one


def test_an_image_is_encoded_to_the_mode(ranks: Ranks, plain: AutoencoderKL) -> None:
    image = torch.rand(2, 24, 16, 3, generator=torch.Generator().manual_seed(1))
    (described,), frames = framed([image])
    _, (latent,) = ranks.turn(orders.TurnEncode(order=2, run=1, image=described, out=None), *frames)
    with torch.no_grad():
        expected = plain.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert torch.equal(latent, expected)
