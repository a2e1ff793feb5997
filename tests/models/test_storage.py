"""Weights that are kept in fp8 and cast layer by layer: what is computed is what the rounded weights give, to the last bit.

A CPU's matrix products depend, in the last bit, on where in memory their matrices begin, and in a mapped file that is anywhere:
so what would lie there is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_formats import scaled
from tests.rank.families import CASES, CPU, Case, normal
from xditd.catalog.lora_fit import fit
from xditd.models.families import load
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.models.reading import WeightFile, held
from xditd.protocol.orders import Merge
from xditd.protocol.plans import FP8

FACTS = flux_facts()
KINDS = {name: CASES[name] for name in ("sd3.5_medium", "pixart_alpha", "hunyuandit_1.2", "sdxl")}
WAYS = ("", "model", "layerwise")


def rounded(path: Path, weight_dtype: str, but: str = " ") -> Path:
    """A file in float32 whose values have been through an 8-bit float; keys that end in `but` have not."""
    weights = {
        key: value if key.endswith(but) else value.to(getattr(torch, weight_dtype)).float()
        for key, value in load_file(path).items()
    }
    save_file(weights, path.with_suffix(f".{weight_dtype}.safetensors"))
    return path.with_suffix(f".{weight_dtype}.safetensors")


def aligned(network: Any) -> Any:
    for parameter in network.backbone.parameters():
        if parameter.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            parameter.data = parameter.data.clone()
    return network


def kept(path: Path, weight_dtype: str, offload: str = "", family: str = "flux") -> Any:
    network = load(
        family, path, "transformer", CPU, torch.float32, offload=offload, weight_dtype=weight_dtype
    )
    return network if offload else aligned(network)


def whole(path: Path, family: str = "flux") -> Any:
    return aligned(load(family, path, "transformer", CPU, torch.float32))


def predict(network: Any, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    given = given or {
        "context": normal(1, 15, FACTS["context_width"], seed=1),
        "pooled": normal(1, FACTS["pooled_width"], seed=2),
    }
    with torch.no_grad():
        conditioning = network.condition(given, {})
        x, t = normal(1, 16, 12, 14), torch.tensor([0.7])
        if network.weights.offload is None:
            return network.predict(x, t, conditioning)
        with network.weights.offload.turn():
            return network.predict(x, t, conditioning)


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return make_flux(tmp_path / "flux.safetensors", dtype=torch.float32)


def dtypes(network: Any) -> set[torch.dtype]:
    """Of what is in blocks."""
    return {value.dtype for name, value in network.backbone.named_parameters() if "blocks." in name}


@pytest.mark.parametrize("offload", WAYS)
@pytest.mark.parametrize("weight_dtype", FP8)
def test_it_computes_what_rounded_weights_give(flux: Path, weight_dtype: str, offload: str) -> None:
    network, reference = kept(flux, weight_dtype, offload), whole(rounded(flux, weight_dtype))
    for _ in range(2):
        assert torch.equal(predict(network), predict(reference))
        assert dtypes(network) == {getattr(torch, weight_dtype)}, "and is in fp8 again"
        away = network.weights.offload.names if offload else ()
        there = dict(network.backbone.named_parameters())
        assert all(there[name].float().isnan().all() for name in away), "or elsewhere, as it was"
    assert not torch.equal(predict(reference), predict(whole(flux)))


@pytest.mark.parametrize("name", KINDS)
def test_so_does_every_family(tmp_path: Path, name: str) -> None:
    """Of PixArt ComfyUI has the tables of scales and shifts in float32, whatever its weight_dtype is."""
    case: Case = KINDS[name]
    path = case.make(tmp_path / "m.safetensors")
    network = kept(path, FP8[0], family=case.family)
    reference = whole(rounded(path, FP8[0], "scale_shift_table"), case.family)
    values = dict(reference.backbone.named_parameters())
    for key, parameter in network.backbone.named_parameters():
        assert torch.equal(parameter.float(), values[key]), key
    tensors, t = case.conditioning(15), torch.tensor([case.t])
    x = normal(1, case.channels, *case.sizes[0])
    with torch.no_grad():
        expected = reference.predict(x, t, reference.condition(tensors, {}))
        assert torch.equal(network.predict(x, t, network.condition(tensors, {})), expected)


def test_a_weight_takes_one_byte(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, plain = kept(flux, FP8[0]), whole(flux)
    inside, outside = 0, 0
    for name, parameter in network.backbone.named_parameters():
        if "blocks." in name:
            inside += parameter.untyped_storage().nbytes()
        else:
            outside += parameter.untyped_storage().nbytes()
    blocks = sum(value.nbytes for name, value in plain.backbone.named_parameters() if "blocks." in name)
    assert inside == blocks // 4
    assert held(network.backbone) == inside + outside
    most = 0

    def look(*arguments: object) -> None:
        nonlocal most
        here = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in network.backbone.parameters()
        }
        most = max(most, sum(here.values()))

    for module in network.backbone.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(look)
    predict(network)
    told, resting = network.weights.counted(network.backbone)
    with capsys.disabled():
        print(f"\n  {held(plain.backbone)} bytes in float32: {inside + outside}, of which one layer is cast at a time to {told}", end="")  # fmt: skip
    assert inside + outside < most <= told, "one layer at a time, no more than is told"
    assert resting == 0


@pytest.mark.parametrize("form", ["plain", "scaled"])
@pytest.mark.parametrize("offload", WAYS)
def test_the_fp8_of_a_file_stays_and_nothing_else_is_rounded(flux: Path, form: str, offload: str) -> None:
    """Matrices are in fp8, all else is in float32, as such files have it."""
    if form == "scaled":
        path, _ = scaled(flux)
    else:
        path = flux.with_suffix(".fp8.safetensors")
        weights = load_file(flux)
        save_file({k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in weights.items()}, path)
    network, reference = kept(path, "file", offload), whole(path)
    assert torch.equal(predict(network), predict(reference))
    for name, parameter in network.backbone.named_parameters():
        matrix = "blocks." in name and parameter.ndim == 2
        assert parameter.dtype == (torch.float8_e4m3fn if matrix else torch.float32), name


def test_weights_with_a_scale_keep_it_and_the_rest_is_rounded(flux: Path) -> None:
    path, worth = scaled(flux)
    network = kept(path, FP8[1])
    save_file(
        {k: v if v.ndim == 2 else v.to(torch.float8_e5m2).float() for k, v in worth.items()}, flux
    )  # as ComfyUI's loader has it
    assert torch.equal(predict(network), predict(whole(flux)))


def test_a_file_in_fp8_is_computed_from_where_it_lies(flux: Path) -> None:
    """On a CPU its weights are the page cache's, and no memory of the process."""
    path = flux.with_suffix(".fp8.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(flux).items()}, path)
    network = load("flux", path, "transformer", CPU, torch.float32, weight_dtype="file")
    lying = [p for n, p in network.backbone.named_parameters() if "blocks." in n]
    assert sum(network.loras._file.has(parameter) for parameter in lying) == len(lying)


@pytest.mark.parametrize("offload", WAYS)
def test_a_lora_is_added_in_full_and_taken_out_again(tmp_path: Path, flux: Path, offload: str) -> None:
    network, reference = kept(flux, FP8[0], offload), whole(rounded(flux, FP8[0]))
    lora = str(make_lora(tmp_path / "l.safetensors", "flux", FACTS))
    plain = predict(network)
    for merges in ((Merge(path=lora, strength=0.8),), (), (Merge(path=lora, strength=-0.5),) * 2):
        network.loras.hold(merges)
        reference.loras.hold(merges)
        assert torch.equal(predict(network), predict(aligned(reference)))
        assert torch.equal(predict(network), plain) == (not merges)
        assert dtypes(network) == {torch.float8_e4m3fn}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_of_a_lora_as_much_lies_beside_as_is_counted(tmp_path: Path, flux: Path, form: str) -> None:
    """The makers' file has one pair for q, k and v, which are three parameters here: its matrices are there once."""
    network = kept(flux, FP8[0])
    path = make_lora(tmp_path / "l.safetensors", "flux", FACTS, form, dtype=torch.bfloat16)
    file = WeightFile(path)
    found = fit(file.header, "flux", FACTS, "flux")
    for strength in (0.8, -0.5):  # the second in the place of the first
        network.loras.hold((Merge(path=str(path), strength=strength),))
    held_back = [one.kept for one in network.loras._file.placed.values() if one.kept is not None]
    beside = [matrix for one in held_back for product in one.added for matrix in (product._up, product._down)]
    lying = {id(matrix): matrix.nbytes for matrix in beside}  # each would be a copy on a GPU
    merged = {
        pair: sum(file.tensor(key).nbytes for key in (pair.up, pair.down))
        for pair in {change.pair for change in found.changes}
        if "blocks" not in pair.module
    }
    assert merged
    assert sum(lying.values()) == found.bytes - sum(merged.values())
    assert found.adding >= 8 * max(one.parameter.numel() for one in held_back)
    network.loras.hold(())
    assert not any(one.added for one in held_back)


@pytest.mark.parametrize("offload", WAYS)
def test_it_sleeps_and_wakes(flux: Path, offload: str) -> None:
    network = kept(flux, FP8[0], offload)
    before = predict(network)
    network.weights.sleep()
    if not offload:
        given_up = [value.untyped_storage() for value in network.backbone.parameters()]
        assert {storage.nbytes() for storage in given_up} == {0}
    network.weights.wake()
    assert torch.equal(predict(network), before)
    assert dtypes(network) == {torch.float8_e4m3fn}


@pytest.mark.parametrize("offload", WAYS)
def test_a_layer_that_fails_is_left_as_it_was(flux: Path, offload: str) -> None:
    network = kept(flux, FP8[0], offload)
    before = predict(network)

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("in the middle")

    hook = network.backbone.single_transformer_blocks[0].attn.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        predict(network)
    hook.remove()
    assert dtypes(network) == {torch.float8_e4m3fn}
    assert torch.equal(predict(network), before)
