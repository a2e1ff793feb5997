"""What a file holds its weights in: understood, or refused by name; GGUF's header read to the byte, or refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog.sparse_files import SMALL_FLUX, header_of
from xditd.catalog.catalog import Catalog
from xditd.catalog.detection import recognise
from xditd.catalog.families import flux
from xditd.catalog.families.expected import BLOCKS
from xditd.catalog.gguf import TYPES
from xditd.catalog.header import Header
from xditd.catalog.quantised import plain
from xditd.catalog.roots import model_roots
from xditd.catalog.weights import read_weights
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import ModelRef


def refusal(ask: Any, *arguments: Any) -> XditError:
    with pytest.raises(XditError) as caught:
        ask(*arguments)
    return caught.value


def with_more(dtype: str, **more: tuple[str, tuple[int, ...]]) -> Header:
    """A Flux in a dtype, and further tensors beside its first qkv."""
    header = header_of(flux.parameters(SMALL_FLUX), dtype)
    beside = "double_blocks.0.img_attn.qkv."
    for ending, (kind, shape) in more.items():
        header = replace(
            header, tensors={**header.tensors, **header_of({beside + ending: shape}, kind).tensors}
        )
    return header


@pytest.mark.parametrize(
    ("what", "header"),
    [
        ("nvfp4", with_more("U8", weight_scale=("F8_E4M3", (768, 16)), weight_scale_2=("F32", ()))),
        ("mxfp8", with_more("F8_E4M3", weight_scale=("U8", (768, 8)))),
        ("int8 or int4", with_more("I8", weight_scale=("F32", ()))),
        ("several scales", with_more("F8_E4M3", weight_scale=("F32", (768, 1)))),
        ("SVDQuant", with_more("U8", wscales=("BF16", (4, 768)))),
        ("NF4", with_more("U8", **{"weight.quant_state.bitsandbytes__nf4": ("U8", (9,))})),
        ("GPTQ", with_more("I32", qzeros=("I32", (4, 4)))),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_a_quantisation_that_is_not_loaded_is_called_by_its_name(what: str, header: Header) -> None:
    error = refusal(plain, header)
    assert error.code is Code.NOT_BUILT
    assert what in error.message
    assert "bf16" in error.message


def test_a_scale_of_a_weight_that_needs_none_is_refused() -> None:
    assert refusal(plain, with_more("BF16", scale_weight=("F32", ()))).code is Code.FILE_INVALID


# --------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, kind: str = "Q8_0", architecture: str = "flux", **sizes: int) -> Path:
    """A Flux whose large matrices are of a type, as ComfyUI-GGUF's converter writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, shape in flux.parameters(SMALL_FLUX | sizes).items():
        quantised = len(shape) == 2 and shape[1] % 256 == 0
        number = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        block, nbytes = gguf.GGML_QUANT_SIZES[number]
        writer.add_tensor(
            key, np.zeros((*shape[:-1], shape[-1] // block * nbytes), np.uint8), raw_dtype=number
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_types_are_those_of_the_package() -> None:
    for number, (name, *sizes) in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (int(kind), gguf.GGML_QUANT_SIZES[kind]) == (number, tuple(sizes))
    assert {name for name, block, _ in TYPES.values() if block > 1} == set(BLOCKS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gguf_file_is_known_by_its_header(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "flux.gguf", kind)
    header = read_weights(path)
    found = recognise(header, "transformer")
    assert (found.family, found.variant, found.dtype) == ("flux", "dev", kind)
    assert found.facts == SMALL_FLUX
    assert header.data_offset + max(entry.end for entry in header.tensors.values()) <= path.stat().st_size


def test_a_gguf_file_is_listed_where_comfyui_gguf_has_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "unet").mkdir(parents=True)
    write_gguf(tmp_path / "models" / "unet" / "flux-Q4_K.gguf", "Q4_K")
    catalog = Catalog(model_roots(comfyui=tmp_path))
    (info,), _ = catalog.list("diffusion_models")
    assert (info.name, info.dtype) == ("flux-Q4_K.gguf", "Q4_K")
    assert catalog.find(ModelRef(kind="unet_gguf", name="flux-Q4_K.gguf")).info == info


def test_a_gguf_file_that_was_cut_short_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "flux.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100_000])
    error = refusal(read_weights, path)
    assert error.code is Code.FILE_INVALID
    assert "bytes are missing" in error.message
    path.write_bytes(whole[:2000])
    assert "ends within its header" in refusal(read_weights, path).message


def test_a_type_or_a_version_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "flux.gguf", "IQ2_XXS")
    assert "GGUF's type 16" in refusal(read_weights, path).message
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert refusal(read_weights, path).code is Code.NOT_BUILT


def test_no_spoilt_gguf_header_does_anything_but_be_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "flux.gguf", double_blocks=1, single_blocks=1).read_bytes()
    spoilt = tmp_path / "spoilt.gguf"

    @settings(max_examples=200, deadline=None)
    @given(st.integers(4, 3000), st.binary(min_size=1, max_size=8))
    def spoil(at: int, junk: bytes) -> None:
        spoilt.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        try:
            recognise(read_weights(spoilt), "transformer")
        except XditError as error:
            error.message.encode()

    spoil()
