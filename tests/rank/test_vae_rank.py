"""A VAE's ranks: one does what diffusers does, bit for bit, whole and in tiles; several share a picture, within rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from tests.rank.ranks import Ranks, framed, running
from xditd.catalog.layouts.autoencoder_kl import pieces
from xditd.models.filling import fill
from xditd.models.making import make_vae, vae_facts
from xditd.models.reading import WeightFile
from xditd.models.vae.config import config
from xditd.protocol import orders

BOUND = 1e-5
"""Of the root mean square of the difference, over the standard deviation of what one process makes."""

SIZES = [(8, 8), (9, 6), (5, 7), (3, 13), (1, 1)]
"""Of latents, in rows and columns: what two ranks share evenly, what not, and what is one row for both."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("v") / "vae.safetensors")


@pytest.fixture(scope="module")
def ranks(path: Path) -> Iterator[Ranks]:
    with running(path.parent / "one", path=path, family="autoencoder_kl", part="vae") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two(path: Path) -> Iterator[Ranks]:
    with running(path.parent / "two", path=path, family="autoencoder_kl", part="vae", patch=2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def plain(path: Path) -> AutoencoderKL:
    facts = vae_facts()
    module = AutoencoderKL(**config(facts))
    fill(module, pieces(facts), WeightFile(path), torch.device("cpu"), torch.float32)
    return module.requires_grad_(False)


def latent_of(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))


def image_of(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(1))


def decoded(plain: AutoencoderKL, latent: torch.Tensor) -> torch.Tensor:
    return ((plain.decode(latent).sample + 1) / 2).clamp(0, 1).movedim(1, -1)


def encoded(plain: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    return plain.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()


def decode(ranks: Ranks, latent: torch.Tensor, **how: int) -> torch.Tensor:
    (described,), frames = framed([latent])
    order = orders.TurnDecode(order=1, run=1, latent=described, clamp=True, out=None, **how)
    return ranks.turn(order, *frames)[1][0]


def encode(ranks: Ranks, image: torch.Tensor, **how: int) -> torch.Tensor:
    (described,), frames = framed([image])
    order = orders.TurnEncode(order=1, run=1, image=described, out=None, **how)
    return ranks.turn(order, *frames)[1][0]


def check(what: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    apart = ours - expected
    rms = float(apart.square().mean().sqrt() / expected.std())
    print(f"  {what}: rms {rms:.1e}, largest {float(apart.abs().max()):.1e}")
    assert rms <= BOUND
    assert float(apart.abs().max()) <= BOUND  # of a picture in 0…1


def test_an_odd_latent_is_decoded_into_its_slot(ranks: Ranks, plain: AutoencoderKL) -> None:
    latent = latent_of(5, 7)
    slots = ranks.slots()
    out = slots.take((1, 40, 56, 3), torch.float32)
    done, _ = ranks.turn(orders.TurnDecode(order=1, run=1, latent=slots.put(latent), clamp=True, out=out))
    assert done.outputs == (out,)
    expected = decoded(plain, latent)
    assert torch.equal(slots.view(out), expected)
    assert 0.05 < expected.std() < 0.5  # a picture, not a grey or a saturated one


def test_an_image_is_encoded_to_the_mode(ranks: Ranks, plain: AutoencoderKL) -> None:
    image = image_of(24, 16, batch=2)
    assert torch.equal(encode(ranks, image), encoded(plain, image))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_two_ranks_share_a_picture(two: Ranks, plain: AutoencoderKL, height: int, width: int) -> None:
    latent, image = latent_of(height, width, batch=2), image_of(8 * height, 8 * width)
    check(f"decode {height} × {width}", decode(two, latent), decoded(plain, latent))
    check(f"encode {height} × {width}", encode(two, image), encoded(plain, image))


def test_tiles_are_those_of_diffusers(ranks: Ranks, plain: AutoencoderKL) -> None:
    latent, image = latent_of(20, 13), image_of(160, 104)
    whole = decoded(plain, latent)
    plain.enable_tiling()
    plain.tile_sample_min_size, plain.tile_latent_min_size = 64, 8
    try:
        tiled = decoded(plain, latent)
        assert torch.equal(decode(ranks, latent, tile=64), tiled)
        assert torch.equal(encode(ranks, image, tile=64), encoded(plain, image))
    finally:
        plain.disable_tiling()
    rms = float((tiled - whole).square().mean().sqrt() / whole.std())
    print(f"  in tiles of 64 pixels, of 160 × 104: rms {rms:.1e} off the picture whole")
    assert rms > BOUND, "tiles are approximate, and are said to be"
    assert torch.equal(decode(ranks, latent), whole), "the next one is whole again"
