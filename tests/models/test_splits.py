"""How layers are divided among ranks: what of a parameter each holds, and that they hold all of a model together."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

import pytest
import torch

from xditd.models.making import flux_facts
from xditd.models.making_transformers import hunyuandit_facts, pixart_facts, sd3_facts
from xditd.models.reading import local
from xditd.models.splits import Cut, Splits
from xditd.rank.sharding import WeightSharding
from xditd.rank.tensor import TensorParallel

LARGE = {
    "flux": flux_facts(heads=24, head_dim=128, double_blocks=19, single_blocks=38),
    "sd3": sd3_facts(width=1536, blocks=24, positions=192),
    "sd3.5_large": sd3_facts(width=2432, blocks=38, positions=192, qk_norm=True),
    "sd3.5_medium": sd3_facts(width=1536, blocks=24, positions=384, qk_norm=True, dual_blocks=13),
    "pixart_sigma": pixart_facts(width=1152, blocks=28),
    "pixart_alpha": pixart_facts(width=1152, blocks=28, sizes=True, positions=64),
    "hunyuandit_1.1": hunyuandit_facts(head_dim=88, blocks=40, ff=6144, sizes=True),
}
"""The makers' own models."""

MODULES = {
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "hunyuandit": "HunyuanDiT2DModel",
}


def on_meta(name: str, facts: Mapping[str, int]) -> tuple[torch.nn.Module, Splits]:
    family = name.partition("_")[0].partition(".")[0]
    network = importlib.import_module(f"xditd.models.{family}.network")
    config = importlib.import_module(f"xditd.models.{family}.config").config
    with torch.device("meta"):
        return getattr(network, MODULES[family])(**config(facts)), network.SPLITS


def size(module: torch.nn.Module) -> int:
    return sum(local(value).numel() for value in module.state_dict().values())


@pytest.mark.parametrize("name", LARGE)
def test_two_ranks_hold_about_half_of_a_real_model_each(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = on_meta(name, LARGE[name])
    full = {parameter: tuple(value.shape) for parameter, value in whole.state_dict().items()}
    network, splits = on_meta(name, LARGE[name])
    cuts = TensorParallel(2, 1, None).divide(network, splits)
    for parameter, value in network.state_dict().items():
        held = cuts[parameter].shape(full[parameter]) if parameter in cuts else full[parameter]
        assert tuple(value.shape) == held
    share = size(network) / size(whole)
    with capsys.disabled():
        print(f"\n  {name}, {size(whole) / 1e9:.2f} billion: {share:.1%} on each of two ranks", end="")
    assert 0.5 <= share <= 0.55


@pytest.mark.parametrize("parts", [(1,), (1, 4), (1, 1)])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_shares_are_disjoint_and_together_the_whole(parts: tuple[int, ...], degree: int) -> None:
    value = torch.arange(3 * 40).view(3, 40)
    shares = [Cut.share(1, 40, index, degree, parts) for index in range(degree)]
    held = [share(value) for share in shares]
    assert all(tuple(part.shape) == share.shape((3, 40)) for part, share in zip(held, shares, strict=True))
    begin = 0
    for part in parts:  # each part by itself is divided in order
        width = 40 * part // sum(parts)
        of_part = [some[:, begin // degree : (begin + width) // degree] for some in held]
        assert torch.equal(torch.cat(of_part, 1), value[:, begin : begin + width])
        begin += width


def test_a_share_of_one_span_is_a_view_and_costs_no_memory() -> None:
    value = torch.zeros(8, 8)
    assert Cut.share(1, 8, 1, 2)(value).untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


def test_what_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(ValueError, match="evenly by 3"):
        Cut.share(0, 8, 0, 3)


@pytest.fixture
def two() -> Iterator[None]:
    """A world of two ranks, of which this process is the first and the second is not there: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "sd3.5_medium" else [pytest.mark.soak]) for name in LARGE]
)
def test_two_ranks_that_shard_a_real_model_hold_about_half_of_it_each(
    name: str, two: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = size(on_meta(name, LARGE[name])[0])
    network, splits = on_meta(name, LARGE[name])
    sharding = WeightSharding.join(2, 0, 2, torch.device("cpu"))
    cuts = sharding.divide(network, splits)
    assert set(cuts) == set(sharding.names)
    share = size(network) / whole
    with capsys.disabled():
        print(f"\n  {name}, {whole / 1e9:.2f} billion, sharded: {share:.1%} on each of two ranks", end="")
    assert share < 0.55
