"""SDXL: the key map is diffusers', the whole vector arrives as it comes, and every input shows in the prediction."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from tests.catalog.test_transformers import SDXL
from tests.rank.families import normal
from xditd.catalog.families import sdxl
from xditd.catalog.layouts.sdxl import pieces
from xditd.models.families import load
from xditd.models.making import make_flux
from xditd.models.making_transformers import make_sdxl, sdxl_facts
from xditd.models.sdxl.config import config
from xditd.rank import attention

SMALL = sdxl_facts(context_width=64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_it_agrees_with_diffusers_converter() -> None:
    prefix = "model.diffusion_model."
    weights = {prefix + key: torch.randn(shape) for key, shape in sdxl.parameters(SMALL).items()}
    converted = convert_ldm_unet_checkpoint(
        dict(weights), {"layers_per_block": 2, "class_embed_type": "projection"}
    )
    ours = pieces(SMALL, prefix)
    assert ours.keys() == converted.keys()
    for name, piece in ours.items():
        assert torch.equal(weights[piece.key], converted[name]), name


def test_every_parameter_of_the_real_network_has_its_place() -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**config(SDXL))
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = sdxl.parameters(SDXL)
    assert {name: piece.shape(shapes[piece.key]) for name, piece in pieces(SDXL).items()} == expected
    assert shapes.keys() == {piece.key for piece in pieces(SDXL).values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vector_is_what_diffusers_makes_of_a_text_and_sizes(tmp_path, dtype: torch.dtype) -> None:
    """diffusers' own SDXL embeds the sizes itself; we are given the whole vector, as ComfyUI makes it."""
    path = make_sdxl(tmp_path / "m.safetensors", SMALL, dtype=dtype)
    network = load("sdxl", path, "transformer", CPU, dtype)
    stock = UNet2DConditionModel(
        **config(SMALL) | {"class_embed_type": None},
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
    ).to(dtype)
    renamed = {
        name.replace("class_embedding", "add_embedding"): value
        for name, value in network.backbone.state_dict().items()
    }
    stock.load_state_dict(renamed)
    text, sizes = normal(1, 1280).to(dtype), torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 768.0]])
    embedded = stock.add_time_proj(sizes.flatten()).view(1, -1).to(dtype)
    x, t, context = normal(1, 4, 12, 10).to(dtype), torch.tensor([601.0]), normal(1, 9, 64).to(dtype)
    given = network.condition({"context": context, "vector": torch.cat([text, embedded], 1)}, {})
    added = {"text_embeds": text, "time_ids": sizes}
    expected = stock(x, t, context, added_cond_kwargs=added, return_dict=False)[0]
    assert (network.predict(x, t, given) - expected).abs().max() <= 1e-5 * expected.std()


def test_a_time_is_not_rounded_to_the_compute_dtype(tmp_path) -> None:
    network = load("sdxl", make_sdxl(tmp_path / "m.safetensors", SMALL), "transformer", CPU, torch.bfloat16)
    seen: list[torch.Tensor] = []
    network.backbone.time_proj.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    given = network.condition({"context": normal(1, 5, 64), "vector": normal(1, 2816)}, {})
    network.predict(normal(1, 4, 8, 8), torch.tensor([601.0]), given)
    assert torch.equal(torch.cat(seen), torch.tensor([601.0]))


def test_torch_chooses_its_kernels_and_status_does_not_say_otherwise(tmp_path) -> None:
    """diffusers' older attention classes heed no backend; its Flux does."""
    small = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}
    paths = {
        "sdxl": make_sdxl(tmp_path / "s.safetensors", SMALL),
        "flux": make_flux(tmp_path / "f.safetensors", **small),
    }
    networks = {name: load(name, path, "transformer", CPU, torch.bfloat16) for name, path in paths.items()}
    assert {name: attention.obeyed(network.backbone) for name, network in networks.items()} == {
        "sdxl": False,
        "flux": True,
    }


def test_a_prediction_tells_every_input_apart(tmp_path) -> None:
    path = make_sdxl(tmp_path / "m.safetensors", SMALL, dtype=torch.float32)
    network = load("sdxl", path, "transformer", CPU, torch.float32)
    given = {"context": normal(1, 9, 64), "vector": normal(1, 2816)}
    x, t = normal(1, 4, 12, 12), torch.tensor([500.0])

    def predict(x=x, t=t, **changes):
        return network.predict(x, t, network.condition(given | changes, {}))

    base = predict()
    assert 0.3 < base.std() < 3
    for changed in (
        predict(x=x + 0.2 * torch.randn_like(x)),
        predict(t=t + 200),
        predict(context=-given["context"]),
        predict(vector=-given["vector"]),
    ):
        assert (changed - base).std() > 0.02
