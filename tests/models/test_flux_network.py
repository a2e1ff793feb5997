"""Flux's inputs: tokens, their places, and times that are not rounded."""

from __future__ import annotations

import pytest
import torch

from xditd.models.families import load
from xditd.models.flux import inputs
from xditd.models.flux.network import Flux
from xditd.models.making import make_flux

SMALL = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def conditioned(network: Flux, **values: float):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "context": torch.randn(1, 9, 64, generator=generator),
        "pooled": torch.randn(1, 32, generator=generator),
    }
    return network.condition(tensors, values)


@pytest.mark.parametrize("size", [(8, 8), (33, 47), (2, 5), (1, 1)])
def test_packing_is_undone_by_unpacking(size: tuple[int, int]) -> None:
    x = torch.randn(2, 16, *size)
    tokens = inputs.pack(x)
    rows, columns = inputs.grid(*size)
    assert tokens.shape == (2, rows * columns, 64)
    assert torch.equal(inputs.unpack(tokens, *size), x)


def test_an_odd_latent_is_padded_from_its_opposite_side() -> None:
    x = torch.arange(15.0).view(1, 1, 3, 5)
    tokens = inputs.pack(x)
    assert tokens[0, 2].tolist() == [4, 0, 9, 5]  # the last column, then the first
    assert tokens[0, 3].tolist() == [10, 11, 0, 1]  # the last row, then the first


def test_a_token_is_channel_then_row_then_column_and_knows_its_place() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    assert inputs.pack(x)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert inputs.image_ids(4, 5, CPU)[4].tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_times_reach_their_embedding_in_float32(tmp_path, dtype: torch.dtype) -> None:
    """diffusers alone would make 904.5 of it 906.25 in bfloat16: the next representable σ, times 1000."""
    network = load("flux", make_flux(tmp_path / "f.safetensors", **SMALL), "transformer", CPU, dtype)
    seen: list[torch.Tensor] = []
    projection = network.backbone.time_text_embed.time_proj
    projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    network.predict(torch.randn(1, 16, 4, 4), torch.tensor([0.9045]), conditioned(network, guidance=3.3))
    assert [time.dtype for time in seen] == [torch.float32, torch.float32]
    assert torch.equal(torch.cat(seen), torch.tensor([0.9045, 3.3]) * 1000)


def test_a_dev_without_guidance_gets_comfyuis_and_a_schnell_takes_none(tmp_path) -> None:
    dev = load("flux", make_flux(tmp_path / "dev.safetensors", **SMALL), "transformer", CPU, torch.float32)
    schnell = load(
        "flux",
        make_flux(tmp_path / "s.safetensors", **SMALL, guidance=False),
        "transformer",
        CPU,
        torch.float32,
    )
    x, t = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    assert torch.equal(dev.predict(x, t, conditioned(dev)), dev.predict(x, t, conditioned(dev, guidance=3.5)))
    assert not torch.equal(
        dev.predict(x, t, conditioned(dev)), dev.predict(x, t, conditioned(dev, guidance=1.0))
    )
    assert schnell.predict(x, t, conditioned(schnell)).shape == x.shape


def test_a_prediction_tells_every_input_apart(tmp_path) -> None:
    """The random weights are worth testing with: nothing is lost in zero gates or drowned in saturation."""
    network = load("flux", make_flux(tmp_path / "f.safetensors", **SMALL), "transformer", CPU, torch.float32)
    x, t, given = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), conditioned(network)
    base = network.predict(x, t, given)
    assert 0.5 < base.std() < 3
    other = network.condition({"context": given.context.flip(1) * 0.5, "pooled": given.pooled}, {})
    for changed in (
        network.predict(x + 0.2 * torch.randn_like(x), t, given),
        network.predict(x, t + 0.1, given),
        network.predict(x, t, other),
        network.predict(x, t, network.condition({"context": given.context, "pooled": -given.pooled}, {})),
    ):
        assert (changed - base).std() > 0.05
