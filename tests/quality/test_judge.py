"""The judge of pictures: it takes every picture that is as its caption says, and says what is wrong with another.

Pictures are made by hand here, by the program that makes those of the training; no network is asked but the VAE.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.train_demo import networks, render, scenes
from tools.train_demo.judge import judge
from tools.train_demo.scenes import Description, Placed, Scene, Thing
from xditd.demo import prompt
from xditd.models.families import load

RED, BLUE = Thing("circle", "red"), Thing("square", "blue")
LEFT_OF = Description((RED, BLUE), relation="left")


def drawn(*many: Scene) -> np.ndarray:
    return render.render(render.numbers(many)).permute(0, 2, 3, 1).numpy()


def scene(description: Description, seed: int = 0) -> Scene:
    return scenes.settle(description, random.Random(seed))


@pytest.fixture(scope="module")
def many():
    """Descriptions of every kind, and a picture of each."""
    chance = random.Random(1)
    described = [scenes.describe(chance) for _ in range(48)]
    return described, drawn(*[scenes.settle(description, chance) for description in described])


def test_every_picture_of_its_own_scene_fits(many):
    faults = {
        scenes.caption(description): judge(picture, description).faults
        for description, picture in zip(*many, strict=True)
    }
    assert not any(faults.values()), {text: said for text, said in faults.items() if said}


def test_hardly_a_picture_fits_another_caption(many):
    described, pictures = many
    others = described[1:] + described[:1]
    assert sum(judge(p, d).fits for p, d in zip(pictures, others, strict=True)) == 0


def test_a_little_noise_and_blur_are_forgiven(many):
    described, pictures = (part[:20] for part in many)
    soft = torch.nn.functional.avg_pool2d(torch.tensor(pictures).permute(0, 3, 1, 2), 3, 1, 1)
    noisy = soft + 0.02 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    for picture, description in zip(noisy.permute(0, 2, 3, 1).clamp(0, 1).numpy(), described, strict=True):
        assert judge(picture, description).fits


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (replace(LEFT_OF, relation="right"), "not left of"),
        (replace(LEFT_OF, relation="above"), "not left of"),
        (replace(LEFT_OF, things=(replace(RED, colour="pink"), BLUE)), "pink circle"),
        (replace(LEFT_OF, things=(replace(RED, shape="heart"), BLUE)), "red heart"),
        (replace(LEFT_OF, things=(replace(RED, size="small"), BLUE)), "which is small"),
        (replace(LEFT_OF, ground="green"), "ground has another colour"),
        (Description((RED,)), "not blue square"),
        (Description((RED, BLUE, replace(BLUE, colour="green"))), "green square"),
    ],
)
def test_what_is_not_as_the_caption_says_is_named(what, said):
    verdict = judge(drawn(scene(what))[0], LEFT_OF)
    assert said in "; ".join(verdict.faults)


def test_counts_and_places_are_held_to():
    three = Description((RED,), count=3)
    assert judge(drawn(scene(replace(three, count=2)))[0], three).faults
    corner = Description((RED,), place="in the top left corner")
    assert (
        "not in the top left corner"
        in judge(drawn(scene(replace(corner, place="at the bottom")))[0], corner).faults[0]
    )


def test_it_finds_a_thing_where_it_is_and_as_large_as_it_is():
    for shape in scenes.SHAPES:
        thing = Thing(shape, "purple")
        at = Scene(Description((thing,)), (Placed(thing, 100.0, 150.0, 40.0),))
        (found,) = judge(drawn(at)[0], at.description).found
        assert (found.shape, found.colour) == (shape, "purple")
        assert (found.x, found.y, found.radius) == pytest.approx((100, 150, 40), abs=2.5)


def test_noise_and_an_empty_page_fit_nothing():
    noise = np.random.default_rng(0).random((scenes.SIDE, scenes.SIDE, 3), dtype=np.float32)
    empty = np.ones_like(noise) * np.asarray(scenes.PAPER, dtype=np.float32) / 255
    assert judge(noise, LEFT_OF).faults
    assert "it has nothing" in judge(empty, LEFT_OF).faults[0]


def test_what_is_held_out_is_the_same_in_every_process_and_wording():
    chance = random.Random(3)
    described = [scenes.describe(chance) for _ in range(4000)]
    part = sum(map(scenes.held_out, described)) / len(described)
    assert 0.035 < part < 0.065
    assert scenes.held_out(described[0]) == scenes.held_out(replace(described[0]))
    assert [i for i, one in enumerate(described[:60]) if scenes.held_out(one)] == HELD


HELD = [34, 45, 46]
"""Of the first 60 of this seed. Other numbers here, and the model was trained on what it is examined in."""


def test_the_vae_brings_pictures_back(many):
    described, pictures = (part[:4] for part in many)
    path = prompt.folder() / networks.FILES["vae"][0]
    vae = load("autoencoder_kl", path, "vae", torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        again = vae.decode(vae.encode(torch.tensor(pictures)))
    error = (again - torch.tensor(pictures)).square().mean()
    print(f"\n  the demo's VAE, there and back: PSNR {-10 * error.log10():.1f} dB")
    assert all(judge(p, d).fits for p, d in zip(again.numpy(), described, strict=True))
    assert -10 * error.log10() > 35
