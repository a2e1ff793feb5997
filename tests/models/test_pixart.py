"""PixArt: every parameter has its place, patches know theirs at any size, and every input shows in the prediction."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from tests.catalog.test_transformers import ALPHA, SIGMA
from tests.rank.families import CASES, normal
from xditd.catalog.families import pixart
from xditd.catalog.layouts.pixart import pieces
from xditd.models.families import load
from xditd.models.making_transformers import make_pixart, pixart_facts
from xditd.models.pixart.config import config, scales

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("facts", [SIGMA, ALPHA], ids=["sigma", "alpha"])
def test_every_parameter_of_the_real_networks_has_its_place(facts) -> None:
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**config(facts))
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = pixart.parameters(facts)
    assert {name: piece.shape(shapes[piece.key]) for name, piece in pieces(facts).items()} == expected
    unused = {"pos_embed", "y_embedder.y_embedding"}
    assert shapes.keys() - {piece.key for piece in pieces(facts).values()} <= unused


@pytest.mark.parametrize("name", ["pixart_sigma", "pixart_alpha"])
def test_it_gives_what_diffusers_gives_with_its_positions_set_for_the_size(tmp_path, name: str) -> None:
    case = CASES[name]
    path = case.make(tmp_path / "m.safetensors")
    network, given, t = (
        load("pixart", path, "transformer", CPU, torch.float32),
        case.conditioning(9),
        torch.tensor([900.0, 20.0]),
    )
    reference = case.reference(path)
    for size in case.sizes:
        x = normal(2, 4, *size)
        ours, theirs = network.predict(x, t, network.condition(given, {})), reference(x, t, given)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.std()


def test_positions_are_measured_by_the_latents_size_and_the_files_picture() -> None:
    """diffusers' own class has one size in mind: with it, a file that carries positions is off at every other."""
    bare, carrying = SIGMA, ALPHA
    assert scales(bare, 128, 128) == scales(carrying, 128, 128) == (64, 2)
    assert scales(bare, 64, 64) == (32, 1)
    assert scales(carrying, 64, 64) == (32, 2)
    assert scales(carrying, 96, 160) == (64, 2)
    assert scales(bare, 256, 256) == (128, 4)


def test_a_time_is_not_rounded_to_the_compute_dtype(tmp_path) -> None:
    path = make_pixart(tmp_path / "m.safetensors", pixart_facts(context_width=64))
    network = load("pixart", path, "transformer", CPU, torch.bfloat16)
    seen: list[torch.Tensor] = []
    projection = network.backbone.adaln_single.emb.time_proj
    projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    network.predict(
        normal(1, 4, 34, 34), torch.tensor([601.0]), network.condition({"context": normal(1, 5, 64)}, {})
    )
    assert torch.equal(torch.cat(seen), torch.tensor([601.0]))


def test_a_prediction_tells_every_input_apart(tmp_path) -> None:
    path = make_pixart(
        tmp_path / "m.safetensors", pixart_facts(context_width=64, sizes=True), dtype=torch.float32
    )
    network = load("pixart", path, "transformer", CPU, torch.float32)
    context, x, t = normal(1, 9, 64), normal(1, 4, 36, 34), torch.tensor([500.0])
    size = {"height": 288.0, "width": 272.0, "aspect_ratio": 288 / 272}

    def predict(x=x, t=t, context=context, **values):
        return network.predict(x, t, network.condition({"context": context}, values))

    base = predict()
    assert base.shape == x.shape
    assert 0.5 < base.std() < 3
    assert torch.equal(base, predict(**size))  # the latent's, where none is given
    for changed in (
        predict(x=x + 0.2 * torch.randn_like(x)),
        predict(t=t + 100),
        predict(context=context * 0.5),
        predict(**{**size, "height": 900.0}),
        predict(**{**size, "width": 900.0}),
        predict(**{**size, "aspect_ratio": 3.0}),
        predict(x=x.roll(2, 3)).roll(-2, 3),  # positions
    ):
        assert (changed - base).std() > 0.02
