"""Weights in fewer bits: what comes out of a file is what its format's own arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_reading import SMALL, private_kib
from xditd.catalog.families import t5
from xditd.catalog.families.expected import BLOCKS
from xditd.catalog.layouts import LAYOUTS
from xditd.models.families import load
from xditd.models.making import flux_facts, make_flux, make_t5, t5_facts
from xditd.models.making_loras import make_lora
from xditd.models.making_transformers import make_sd3, sd3_facts
from xditd.models.reading import WeightFile
from xditd.protocol.orders import Merge

CPU = torch.device("cpu")


def scaled(path: Path, old: bool = True) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file in scaled fp8 of a file in float32, and what its weights are worth."""
    weights, worth = {}, {}
    for key, value in load_file(path).items():
        if value.ndim != 2:
            weights[key] = worth[key] = value
            continue
        scale = value.abs().max() / 448
        weights[key] = (value / scale).to(torch.float8_e4m3fn)
        name = key.removesuffix("weight")
        weights[name + ("scale_weight" if old else "weight_scale")] = scale
        if old:
            weights[name + "scale_input"] = torch.tensor(3.0)
        else:
            weights[name + "comfy_quant"] = torch.tensor(
                list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
            )
        worth[key] = weights[key].float() * scale
    if old:
        weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(weights, path.with_suffix(".fp8.safetensors"))
    return path.with_suffix(".fp8.safetensors"), worth


def expected(family: str, facts: dict[str, int], worth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's parameters of a file's tensors."""
    values = {}
    for name, piece in LAYOUTS[family].pieces(facts, "").items():
        value = worth[piece.key]
        value = value if piece.rows is None else value[slice(*piece.rows)]
        values[name] = value.roll(value.shape[0] // 2, 0) if piece.swapped else value
    return values


def parameters(network: Any) -> dict[str, torch.Tensor]:
    return {name: placed.parameter.data for name, placed in network.loras._file.placed.items()}


@pytest.mark.parametrize("old", [True, False], ids=["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_fp8_is_worth_weight_times_scale(tmp_path: Path, old: bool, dtype: torch.dtype) -> None:
    path, worth = scaled(make_flux(tmp_path / "flux.safetensors", **SMALL, dtype=torch.float32), old)
    network = load("flux", path, "transformer", CPU, dtype)
    for name, value in expected("flux", flux_facts(**SMALL), worth).items():
        assert torch.equal(parameters(network)[name], value.to(dtype)), name


def test_a_lora_is_merged_into_what_scaled_fp8_is_worth_and_taken_out_again(tmp_path: Path) -> None:
    path, _ = scaled(make_flux(tmp_path / "flux.safetensors", **SMALL, dtype=torch.float32))
    network = load("flux", path, "transformer", CPU, torch.bfloat16)
    before = {name: value.clone() for name, value in parameters(network).items()}
    lora = make_lora(tmp_path / "l.safetensors", "flux", flux_facts(**SMALL))
    network.loras.hold((Merge(path=str(lora), strength=1.0),))
    assert not torch.equal(parameters(network)["x_embedder.weight"], before["x_embedder.weight"])
    network.loras.hold(())
    assert all(torch.equal(value, before[name]) for name, value in parameters(network).items())


def write_gguf(
    path: Path, weights: dict[str, torch.Tensor], kind: str, architecture: str
) -> dict[str, torch.Tensor]:
    """Writes weights, matrices in blocks of a type where those divide them; what they are worth by the package itself."""
    writer = gguf.GGUFWriter(path, architecture)
    worth = {}
    generator = np.random.default_rng(1)
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    for key, value in weights.items():
        if value.ndim != 2 or value.shape[1] % block:
            worth[key] = value
            writer.add_tensor(key, value.numpy())
            continue
        try:
            data = gguf.quants.quantize(value.numpy(), number)
        except NotImplementedError:  # the package reads K-quants and does not write them: any bytes will do
            data = generator.integers(0, 60, (value.shape[0], value.shape[1] // block * nbytes), np.uint8)
        worth[key] = torch.from_numpy(gguf.quants.dequantize(data, number))
        writer.add_tensor(key, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


WIDE = {
    "heads": 2,
    "head_dim": 128,
    "double_blocks": 1,
    "single_blocks": 1,
    "context_width": 256,
    "pooled_width": 32,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gguf_flux_is_worth_what_the_package_says(tmp_path: Path, kind: str) -> None:
    weights = load_file(make_flux(tmp_path / "flux.safetensors", **WIDE, dtype=torch.float32))
    worth = write_gguf(tmp_path / "flux.gguf", weights, kind, "flux")
    assert any(not torch.equal(worth[key], weights[key]) for key in weights)
    network = load("flux", tmp_path / "flux.gguf", "transformer", CPU, torch.float32)
    for name, value in expected("flux", flux_facts(**WIDE), worth).items():
        assert torch.equal(parameters(network)[name], value), name


def test_a_gguf_sd3_is_worth_what_the_package_says_in_any_dtype(tmp_path: Path) -> None:
    facts = sd3_facts(width=128, positions=4, context_width=64, pooled_width=32)
    weights = load_file(make_sd3(tmp_path / "sd3.safetensors", facts, dtype=torch.float32))
    worth = write_gguf(tmp_path / "sd3.gguf", weights, "Q5_1", "sd3")
    network = load("sd3", tmp_path / "sd3.gguf", "transformer", CPU, torch.bfloat16)
    for name, value in expected("sd3", facts, worth).items():
        if name in parameters(network):
            assert torch.equal(parameters(network)[name], value.to(torch.bfloat16)), name


LLAMA = {
    "SelfAttention.relative_attention_bias": "attn_rel_b", "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o", "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wo": "ffn_down",
}  # fmt: skip


def llama(key: str) -> str:
    """llama.cpp's name for a tensor of T5's encoder."""
    if key == "shared.weight":
        return "token_embd.weight"
    if key == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    _, _, block, _, layer, rest = key.split(".", 5)
    name = rest.removesuffix(".weight")
    norm = "attn_norm" if layer == "0" else "ffn_norm"
    return f"enc.blk.{block}.{norm if name == 'layer_norm' else LLAMA[name]}.weight"


def test_a_gguf_t5_has_its_names_back(tmp_path: Path) -> None:
    sizes = {"width": 64, "layers": 2}
    weights = load_file(make_t5(tmp_path / "t5.safetensors", **sizes, dtype=torch.float32))
    worth = write_gguf(
        tmp_path / "t5.gguf", {llama(key): value for key, value in weights.items()}, "Q8_0", "t5encoder"
    )
    file = WeightFile(tmp_path / "t5.gguf")
    assert file.header.tensors.keys() >= t5.parameters(t5_facts(**sizes)).keys()
    network = load("t5", tmp_path / "t5.gguf", "text_encoder", CPU, torch.float32)
    query = network.backbone.state_dict()["block.1.layer.0.SelfAttention.q.weight"]
    assert torch.equal(query, worth["enc.blk.1.attn_q.weight"])


def test_shards_are_mapped_each_and_shared(tmp_path: Path) -> None:
    whole = make_flux(tmp_path / "flux.safetensors", **SMALL)
    folder, weights, where = tmp_path / "folder", load_file(whole), {}
    folder.mkdir()
    for number in range(2):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        mine = {key: weights[key] for key in list(weights)[number::2]}
        where |= dict.fromkeys(mine, name)
        save_file(mine, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    ours, theirs = (load("flux", path, "transformer", CPU, torch.bfloat16) for path in (folder, whole))
    for name, value in parameters(theirs).items():
        assert torch.equal(parameters(ours)[name], value), name
    assert all(private_kib(folder / name) == 0 for name in set(where.values()))
