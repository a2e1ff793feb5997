"""LoRAs of every trainer change the weights that they name, by as much as they say, and leave no trace when they are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_reading import private_kib
from xditd.catalog.header import read_header
from xditd.catalog.layouts import LAYOUTS
from xditd.catalog.lora_fit import family_of, fit
from xditd.catalog.weights import read_weights
from xditd.models.families import load
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import FORMS, make_lora
from xditd.models.making_transformers import (
    hunyuandit_facts,
    make_hunyuandit,
    make_pixart,
    make_sd3,
    make_sdxl,
    pixart_facts,
    sd3_facts,
    sdxl_facts,
)
from xditd.protocol.errors import Code, XditError
from xditd.protocol.orders import Merge

CPU = torch.device("cpu")
FLUX = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}


@dataclass(frozen=True)
class Kind:
    facts: dict[str, int]
    make: Callable[..., Path] | None


KINDS = {
    "flux": Kind(flux_facts(**FLUX), lambda path, **how: make_flux(path, **FLUX, **how)),
    "sd3": Kind(sd3_facts(width=128, positions=4, qk_norm=True, dual_blocks=1, context_width=64), None),
    "pixart": Kind(pixart_facts(context_width=64, sizes=True), None),
    "sdxl": Kind(sdxl_facts(channels=(64, 64), depths=(0, 1), context_width=64), None),
}
KINDS["hunyuandit"] = Kind(hunyuandit_facts(context_width=64, t5_width=64), None)
MAKERS: dict[str, Callable[..., Path]] = {
    "hunyuandit": make_hunyuandit,
    "sd3": make_sd3,
    "pixart": make_pixart,
    "sdxl": make_sdxl,
}


def make(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    kind = KINDS[family]
    return kind.make(path, dtype=dtype) if kind.make else MAKERS[family](path, kind.facts, dtype=dtype)


def by_hand(
    family: str, before: dict[str, torch.Tensor], lora: Path, form: str, strength: float
) -> dict[str, torch.Tensor]:
    """A network's weights with a LoRA merged in float64, without any of the code that merges."""
    layout, pattern, up, down, _ = FORMS[form]
    pieces = LAYOUTS[family].pieces(KINDS[family].facts, "")
    weights = {name: value.double() for name, value in before.items()}
    pairs = load_file(lora)

    def name_in_file(name: str) -> str:
        name = name.removesuffix(".weight")
        return pattern.replace("{.}", name).replace("{_}", name.replace(".", "_"))

    def delta(module: str) -> torch.Tensor | None:
        if module + up not in pairs:
            return None
        ups, downs = pairs[module + up].double(), pairs[module + down].double()
        scale = float(pairs[module + ".alpha"]) / downs.shape[0] if module + ".alpha" in pairs else 1.0
        return strength * scale * ups.flatten(1) @ downs.flatten(1)

    for name, piece in pieces.items():
        change = delta(name_in_file(name if layout == "diffusers" else piece.key))
        if change is None:
            continue
        if layout == "makers":
            if piece.rows is not None:
                change = change[slice(*piece.rows)]
            if piece.swapped:
                change = change.roll(change.shape[0] // 2, 0)
        weights[name] += change.reshape(weights[name].shape)
    return weights


def state(network: Any) -> dict[str, torch.Tensor]:
    return {name: placed.parameter.data for name, placed in network.loras._file.placed.items()}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: load(family, make(family, folder / family), "transformer", CPU, torch.float32)
        for family in KINDS
    }


CASES = [(family, form) for family in KINDS for form in FORMS if form != "diffusers-unet" or family == "sdxl"]


@pytest.mark.parametrize(("family", "form"), CASES, ids=lambda part: str(part))
def test_every_trainers_names_change_what_they_name(
    tmp_path: Path, networks: dict[str, Any], capsys, family: str, form: str
) -> None:
    network = networks[family]
    lora = make_lora(tmp_path / "l.safetensors", family, KINDS[family].facts, form, seed=3)
    network.loras.hold(())
    before = {name: value.clone() for name, value in state(network).items()}
    expected = by_hand(family, before, lora, form, 0.75)
    assert family_of(read_header(lora)) == family
    found = fit(read_header(lora), family, KINDS[family].facts, "m")
    assert found.matched == found.pairs > 10
    assert not found.unmatched

    network.loras.hold((Merge(path=str(lora), strength=0.75),))
    merged = {name: value.clone() for name, value in state(network).items()}
    worst = max(
        float((merged[name] - value).abs().max() / value.std())
        for name, value in expected.items()
        if value.numel() > 1
    )
    with capsys.disabled():
        print(f"{family} {form}: {found.matched} pairs, {worst:.1e} off weights merged by hand")
    assert worst <= 1e-6
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in before.items() if name.endswith(".weight") and value.ndim > 1}


def test_on_off_on_is_where_it_was_to_the_last_bit(tmp_path: Path) -> None:
    path = make("flux", tmp_path / "m.safetensors", torch.bfloat16)
    loras = [make_lora(tmp_path / f"{i}.safetensors", "flux", KINDS["flux"].facts, seed=i) for i in range(2)]
    network = load("flux", path, "transformer", CPU, torch.bfloat16)
    before = {name: value.clone() for name, value in state(network).items()}
    two = tuple(Merge(path=str(lora), strength=s) for lora, s in zip(loras, (0.8, -0.3), strict=True))

    network.loras.hold(two)
    first = {name: value.clone() for name, value in state(network).items()}
    network.loras.hold(two[:1])
    network.loras.hold(())
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())
    assert private_kib(path) == 0  # and the parameters are the file's own pages again
    network.loras.hold(two)
    assert all(torch.equal(value, first[name]) for name, value in state(network).items())
    assert not all(torch.equal(value, before[name]) for name, value in first.items())


def test_a_change_of_strength_is_as_if_nothing_had_been_merged_before(tmp_path: Path) -> None:
    path = make("flux", tmp_path / "m.safetensors")
    lora = str(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    one, other = (load("flux", path, "transformer", CPU, torch.float32) for _ in range(2))
    one.loras.hold((Merge(path=lora, strength=1.0),))
    one.loras.hold((Merge(path=lora, strength=0.4),))
    other.loras.hold((Merge(path=lora, strength=0.4),))
    assert all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


def test_a_file_that_was_replaced_is_another_lora(tmp_path: Path) -> None:
    path = make("flux", tmp_path / "m.safetensors")
    lora = make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts)
    one, other = (load("flux", path, "transformer", CPU, torch.float32) for _ in range(2))
    one.loras.hold((Merge(path=str(lora), strength=1.0, stamp=(1,)),))
    trained_on = {key: value * 2 for key, value in load_file(lora).items()}
    save_file(trained_on, lora)
    one.loras.hold((Merge(path=str(lora), strength=1.0, stamp=(2,)),))
    other.loras.hold((Merge(path=str(lora), strength=1.0),))
    assert all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


def test_scaled_fp8_is_refused_instead_of_merged_without_its_scale(tmp_path: Path) -> None:
    pairs = load_file(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    (first, *_) = [key for key in pairs if key.endswith("lora_up.weight")]
    pairs[first] = pairs[first].to(torch.float8_e4m3fn)
    pairs[first.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
    save_file(pairs, tmp_path / "s.safetensors")
    code, message = refused(tmp_path / "s.safetensors")
    assert code == Code.NOT_BUILT
    assert "scaled fp8" in message


def test_after_a_change_that_failed_half_way_the_next_one_is_whole(tmp_path: Path, monkeypatch) -> None:
    path = make("flux", tmp_path / "m.safetensors")
    lora = str(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    network = load("flux", path, "transformer", CPU, torch.float32)
    before = {name: value.clone() for name, value in state(network).items()}
    merge_one, made = network.loras._merge, []

    def fails_at_the_tenth(*arguments: Any) -> None:
        made.append(arguments[0])
        if len(made) == 10:
            raise MemoryError
        merge_one(*arguments)

    monkeypatch.setattr(network.loras, "_merge", fails_at_the_tenth)
    with pytest.raises(MemoryError):
        network.loras.hold((Merge(path=lora, strength=1.0),))
    assert any(not torch.equal(value, before[name]) for name, value in state(network).items())
    monkeypatch.undo()
    network.loras.hold(())
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())


def refused(path: Path, family: str = "flux") -> tuple[Code | str, str]:
    with pytest.raises(XditError) as caught:
        fit(read_weights(path), family, KINDS[family].facts, "dev.safetensors")
    return caught.value.code, caught.value.message


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        (".dora_scale", "a DoRA"),
        (".lora_magnitude_vector.weight", "a DoRA"),
        (".hada_w1_a", "a LoHa"),
        (".lokr_w1", "a LoKr"),
        (".lora_mid.weight", "a LoCon with a core"),
        (".diff_b", "whole differences"),
        (".lora_B.bias", "biases"),
    ],
)
def test_what_is_more_than_a_pair_is_refused_by_name(tmp_path: Path, ending: str, what: str) -> None:
    """A dora_scale that is dropped would give another picture, and no error."""
    pairs = load_file(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    save_file(
        pairs | {"lora_unet_double_blocks_0_img_attn_qkv" + ending: torch.ones(4, 1)},
        tmp_path / "d.safetensors",
    )
    code, message = refused(tmp_path / "d.safetensors")
    assert code == Code.NOT_BUILT
    assert what in message


def test_a_lora_for_something_else_is_refused(tmp_path: Path) -> None:
    other = make_lora(tmp_path / "sd3.safetensors", "sd3", KINDS["sd3"].facts)
    code, message = refused(other)
    assert code == Code.LORA_MISMATCH
    assert "is a LoRA for sd3" in message
    save_file({"lora_unet_what.lora_up.weight": torch.ones(8, 4), "lora_unet_what.lora_down.weight": torch.ones(4, 8)}, tmp_path / "x.safetensors")  # fmt: skip
    code, message = refused(tmp_path / "x.safetensors")
    assert code == Code.LORA_MISMATCH
    assert "none of its 1 names is one of dev.safetensors's (lora_unet_what)" in message
    wide = make_lora(tmp_path / "wide.safetensors", "flux", flux_facts(**{**FLUX, "heads": 4}))
    code, message = refused(wide)
    assert code == Code.LORA_MISMATCH
    assert "another size" in message
    save_file({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 4),
               "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)}, tmp_path / "te.safetensors")  # fmt: skip
    code, message = refused(tmp_path / "te.safetensors")
    assert code == Code.LORA_MISMATCH
    assert "text encoders alone" in message
    code, message = refused(make("flux", tmp_path / "model.safetensors"))
    assert code == Code.UNKNOWN_FAMILY


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    pairs = load_file(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    gone = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    save_file({key: value for key, value in pairs.items() if key != gone}, tmp_path / "half.safetensors")
    code, message = refused(tmp_path / "half.safetensors")
    assert code == Code.FILE_INVALID
    assert gone in message


def test_what_matches_in_part_says_how_much(tmp_path: Path) -> None:
    pairs = load_file(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    for name in ("lora_unet_double_blocks_77_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        pairs |= {f"{name}.lora_up.weight": torch.ones(8, 4), f"{name}.lora_down.weight": torch.ones(4, 8)}
    save_file(pairs, tmp_path / "part.safetensors")
    found = fit(read_header(tmp_path / "part.safetensors"), "flux", KINDS["flux"].facts, "m")
    assert (found.pairs - found.matched, found.text) == (1, 1)
    assert found.unmatched == ("lora_unet_double_blocks_77_img_attn_qkv",)
