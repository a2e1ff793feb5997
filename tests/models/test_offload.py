"""Weights that wait in the host's memory: they come for a turn or a layer, leave again, and not one bit differs.

On a CPU device and host are the same memory. What is held is still told apart: what waits is the file's, what has come
is in buffers of the network's own, and what is away is NaN.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.rank.families import CASES, CPU, Case, normal
from xditd.catalog.families.layers import layers
from xditd.models.families import FAMILIES, load
from xditd.models.making import bert_facts, clip_facts, flux_facts, make_flux, make_vae, t5_facts
from xditd.models.making_loras import make_lora
from xditd.models.making_transformers import hunyuandit_facts, pixart_facts, sd3_facts, sdxl_facts
from xditd.models.offload import Offload
from xditd.models.reading import WeightFile, held
from xditd.protocol.orders import Merge
from xditd.protocol.plans import ModelInfo

MODES = ("model", "layerwise")
FACTS = {
    "flux": flux_facts(),
    "sd3": sd3_facts(),
    "pixart": pixart_facts(),
    "hunyuandit": hunyuandit_facts(),
    "sdxl": sdxl_facts(),
    "clip": clip_facts(),
    "t5": t5_facts(),
    "bert": bert_facts(),
}
KINDS = {name: CASES[name] for name in ("sd3.5_medium", "pixart_alpha", "hunyuandit_1.2", "sdxl")}


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return make_flux(tmp_path / "flux.safetensors", dtype=torch.bfloat16)


def given(network: object) -> dict[str, torch.Tensor]:
    facts = flux_facts()
    return {
        "context": normal(1, 15, facts["context_width"], seed=1),
        "pooled": normal(1, facts["pooled_width"], seed=2),
    }


def predict(network: object, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return network.predict(
            normal(1, 16, 12, 14), torch.tensor([0.7]), network.condition(conditioning, {})
        )


def whole_and_offloaded(path: Path, family: str, mode: str) -> tuple[object, object]:
    """The network without and with it.

    A CPU's matrix products depend on where in memory their matrices begin, in the last bit: in a mapped file that is
    anywhere. So what does not come into a buffer is copied to where torch puts it, at a multiple of 64 bytes.
    """
    whole, offloaded = (
        load(family, path, "transformer", CPU, torch.float32, offload=offload) for offload in ("", mode)
    )
    for network in (whole, offloaded):
        away = network.weights.offload.names if network is offloaded else ()
        for name, parameter in network.backbone.named_parameters():
            if name not in away:
                parameter.data = parameter.data.clone()
    return whole, offloaded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_every_family_computes_the_same_bits(tmp_path: Path, name: str, mode: str) -> None:
    case: Case = KINDS[name]
    whole, offloaded = whole_and_offloaded(case.make(tmp_path / "m.safetensors"), case.family, mode)
    tensors = case.conditioning(15)
    x, t = normal(1, case.channels, *case.sizes[0]), torch.tensor([case.t])
    with torch.no_grad():
        expected = whole.predict(x, t, whole.condition(tensors, {}))
        for _ in range(2):  # once more: now it is known what runs after what
            with offloaded.weights.offload.turn():
                assert torch.equal(offloaded.predict(x, t, offloaded.condition(tensors, {})), expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_away_is_nan_and_takes_no_memory(flux: Path, mode: str) -> None:
    whole, network = whole_and_offloaded(flux, "flux", mode)
    offload = network.weights.offload
    assert held(network.backbone) + offload.waiting >= held(whole.backbone)
    assert offload.here == 0
    most = 0

    def look(*arguments: object) -> None:
        nonlocal most
        here = {
            parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
            for parameter in network.backbone.parameters()
            if not parameter.isnan().any()
        }
        most = max(most, sum(here.values()))

    for module in network.backbone.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(look)
    with offload.turn():
        assert torch.equal(predict(network, given(network)), predict(whole, given(whole)))
    total, resting = network.weights.counted(network.backbone)
    assert 0 < most <= total, "of what was there at a time, no more than is told"
    assert resting == offload.waiting
    if mode == "layerwise":
        assert most < 0.7 * held(whole.backbone)
    assert offload.here == 0
    away = [p for name, p in network.backbone.named_parameters() if name in offload.names]
    assert all(parameter.isnan().all() and parameter.untyped_storage().nbytes() == 4 for parameter in away)
    if mode == "model":
        assert predict(network, given(network)).isnan().all(), "outside of a turn, never a picture"
    else:
        with pytest.raises(RuntimeError, match="away"):
            predict(network, given(network))


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_is_merged_where_the_weights_wait_and_undone_to_the_last_bit(
    tmp_path: Path, flux: Path, mode: str
) -> None:
    lora = make_lora(tmp_path / "l.safetensors", "flux", flux_facts())
    whole, network = whole_and_offloaded(flux, "flux", mode)
    plain = predict(whole, given(whole))
    for merges in ((Merge(path=str(lora), strength=0.8),), (), (Merge(path=str(lora), strength=-0.5),)):
        whole.loras.hold(merges)
        with network.weights.offload.turn():
            network.loras.hold(merges)  # as the last moment has it: the weights have come
            assert torch.equal(predict(network, given(network)), predict(whole, given(whole)))
        with network.weights.offload.turn():
            found = predict(network, given(network))
        assert torch.equal(found, predict(whole, given(whole))), "and so have they when they come again"
        assert torch.equal(found, plain) == (not merges)


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_that_raises_leaves_nothing_behind(flux: Path, mode: str) -> None:
    whole, network = whole_and_offloaded(flux, "flux", mode)
    offload = network.weights.offload

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("in the middle")

    hook = network.backbone.single_transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), offload.turn():
        predict(network, given(network))
    assert offload.here == 0
    hook.remove()
    with offload.turn():
        assert torch.equal(predict(network, given(network)), predict(whole, given(whole)))


def test_a_turn_that_cannot_begin_leaves_nothing_behind(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, network = whole_and_offloaded(flux, "flux", "model")
    offload = network.weights.offload

    def fail(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("on the way")

    with monkeypatch.context() as lacking:
        lacking.setattr(offload._file, "value", fail)
        with pytest.raises(torch.OutOfMemoryError), offload.turn():
            raise AssertionError("it began without its weights")
    assert offload.here == 0
    with offload.turn():
        assert torch.equal(predict(network, given(network)), predict(whole, given(whole)))


@pytest.mark.parametrize("mode", MODES)
def test_it_sleeps_and_wakes(flux: Path, mode: str) -> None:
    whole, network = whole_and_offloaded(flux, "flux", mode)
    for _ in range(2):
        network.weights.sleep()
        network.weights.wake()
        with network.weights.offload.turn():
            assert torch.equal(predict(network, given(network)), predict(whole, given(whole)))


def test_a_vae_comes_for_a_turn(tmp_path: Path) -> None:
    path = make_vae(tmp_path / "vae.safetensors")
    whole, network = (
        load("autoencoder_kl", path, "vae", CPU, torch.float32, offload=o) for o in ("", "model")
    )
    latent = normal(1, 16, 4, 4)
    with torch.no_grad(), network.weights.offload.turn():
        assert torch.equal(network.decode(latent), whole.decode(latent))


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.layers])
def test_the_daemon_counts_by_facts_alone_what_comes_as_a_layer(flux: Path, family: str) -> None:
    """Two tables say what the layers of a family are: `catalog.families` by the keys of its files, `models.families` by modules."""
    facts = FACTS[family]
    with torch.device("meta"):
        network = FAMILIES[family].kind.empty(facts)
    offload = Offload(network, FAMILIES[family].layers, WeightFile(flux), CPU, torch.float32)
    largest = max(sum(math.prod(home.shape) for home in part.homes.values()) for part in offload._parts)
    info = ModelInfo(
        kind="", name="", part="", family=family, variant="", dtype="float32", bytes=0, parameters=0, facts=facts
    )  # fmt: skip
    counted = layers(info)
    assert counted.largest == largest
    inside = {name for part in offload._parts for name in part.homes}
    outside = sum(p.numel() for name, p in network.named_parameters() if name not in inside)
    assert counted.rest >= outside, (
        "more: some files have tables that the network makes itself, or has no use for"
    )
