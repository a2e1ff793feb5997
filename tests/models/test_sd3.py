"""SD3: the key map is diffusers', each patch knows its place, and every input shows in the prediction."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from tests.catalog.test_transformers import SD3, SD35_LARGE, SD35_MEDIUM
from xditd.catalog.families import sd3
from xditd.catalog.layouts.sd3 import pieces
from xditd.models.families import load
from xditd.models.making_transformers import make_sd3, sd3_facts
from xditd.models.sd3.config import config

SMALL = sd3_facts(context_width=64, pooled_width=32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [{}, {"qk_norm": True}, {"qk_norm": True, "dual_blocks": 2}], ids=str)
def test_it_agrees_with_diffusers_converter(kind) -> None:
    facts = sd3_facts(width=128, blocks=3, positions=4, **kind)
    weights = {key: torch.randn(shape) for key, shape in sd3.parameters(facts).items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    ours = pieces(facts)
    assert ours.keys() == converted.keys()
    for name, piece in ours.items():
        value = weights[piece.key]
        if piece.rows is not None:
            value = value[slice(*piece.rows)]
        if piece.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        assert torch.equal(value, converted[name]), name


@pytest.mark.parametrize("facts", [SD3, SD35_LARGE, SD35_MEDIUM], ids=["3", "3.5 large", "3.5 medium"])
def test_every_parameter_of_the_real_networks_has_its_place(facts) -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel(**config(facts))
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = sd3.parameters(facts)
    assert {name: piece.shape(shapes[piece.key]) for name, piece in pieces(facts).items()} == expected


def test_times_reach_their_embedding_in_float32(tmp_path) -> None:
    """In bfloat16, 904.5 would be 904."""
    path = make_sd3(tmp_path / "m.safetensors", SMALL)
    network = load("sd3", path, "transformer", CPU, torch.bfloat16)
    seen: list[torch.Tensor] = []
    projection = network.backbone.time_text_embed.time_proj
    projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    given = network.condition({"context": torch.randn(1, 5, 64), "pooled": torch.randn(1, 32)}, {})
    network.predict(torch.randn(1, 16, 4, 4), torch.tensor([904.5]), given)
    assert torch.equal(torch.cat(seen), torch.tensor([904.5]))


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (1, 3)])
def test_it_gives_what_diffusers_whole_module_gives(tmp_path, size: tuple[int, int]) -> None:
    """Its column of patches is the image that they came from, and each has the position that diffusers crops for it."""
    from tests.rank.families import CASES, normal

    case = CASES["sd3"]
    path = case.make(tmp_path / "m.safetensors")
    network, given, x = (
        load("sd3", path, "transformer", CPU, torch.float32),
        case.conditioning(9),
        normal(2, 16, *size),
    )
    t = torch.tensor([900.0, 20.0])
    ours, theirs = network.predict(x, t, network.condition(given, {})), case.reference(path)(x, t, given)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.std()


def test_a_prediction_tells_every_input_apart(tmp_path) -> None:
    path = make_sd3(tmp_path / "m.safetensors", SMALL, dtype=torch.float32)
    network = load("sd3", path, "transformer", CPU, torch.float32)
    given = {"context": torch.randn(1, 9, 64), "pooled": torch.randn(1, 32)}
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([500.0])

    def predict(x=x, t=t, **changes):
        return network.predict(x, t, network.condition(given | changes, {}))

    base = predict()
    assert 0.5 < base.std() < 3
    for changed in (
        predict(x=x + 0.2 * torch.randn_like(x)),
        predict(t=t + 100),
        predict(context=given["context"] * 0.5),
        predict(pooled=-given["pooled"]),
        predict(x=x.roll(2, 3)).roll(-2, 3),  # positions
    ):
        assert (changed - base).std() > 0.05
