"""Weights that sleep take no memory, and wake as they were: to the last bit, and in the same tensors."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from xditd.models import families
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.protocol import orders
from xditd.rank.device import Device
from xditd.rank.rest import resting

SHAPE = {"heads": 6, "head_dim": 64, "context_width": 64, "pooled_width": 32}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("w") / "flux.safetensors", **SHAPE)


def state(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.backbone.state_dict().items()}


def same(network, before: dict[str, torch.Tensor]) -> bool:
    now = network.backbone.state_dict()
    return all(
        torch.equal(now[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items()
    )


def own() -> int:
    """Bytes of this process's memory, with those of files that it has mapped and read."""
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["the file's pages", "copies"])
def test_what_sleeps_takes_no_memory_and_wakes_to_the_last_bit(path: Path, dtype: torch.dtype) -> None:
    network = families.load("flux", path, "transformer", CPU, dtype)
    held = sum(value.nbytes for value in network.backbone.parameters())
    parameters = list(network.backbone.parameters())
    before = state(network)
    awake = own()
    network.weights.sleep()
    asleep = own()
    network.weights.sleep()  # asleep already
    assert awake - asleep > 0.8 * held
    network.weights.wake()
    network.weights.wake()
    assert same(network, before)
    assert all(a is b for a, b in zip(parameters, network.backbone.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["the file's pages", "copies"])
def test_merged_loras_are_taken_out_before_a_cpu_sleeps_and_merge_to_the_same_bits_after(
    path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    network = families.load("flux", path, "transformer", CPU, dtype)
    lora = make_lora(tmp_path / "lora.safetensors", "flux", flux_facts(**SHAPE))
    wanted = (orders.Merge(path=str(lora), strength=0.7),)
    plain = state(network)
    network.loras.hold(wanted)
    merged = state(network)
    assert not same(network, plain)
    handlers = resting(network, Device("cpu:0"))
    awake = own()
    handlers[orders.Sleep](orders.Sleep(), ())
    assert awake - own() > 0.8 * sum(value.nbytes for value in plain.values())
    handlers[orders.Wake](orders.Wake(), ())
    assert same(network, plain)
    network.loras.hold(wanted)
    assert same(network, merged)
