"""Folders as diffusers saves them: listed as one model each, and refused with a sentence where something is amiss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.catalog.sparse_files import FLUX_DEV, FLUX_VAE, SMALL_FLUX, entries, header_of, write
from tests.catalog.test_text_encoders import TINY_CLIP, TINY_T5
from tests.catalog.test_transformers import SDXL
from xditd.catalog.catalog import Catalog
from xditd.catalog.detection import recognise
from xditd.catalog.families import clip, t5
from xditd.catalog.families import flux as flux_family
from xditd.catalog.layouts import LAYOUTS
from xditd.catalog.roots import model_roots
from xditd.catalog.weights import read_weights
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import ModelRef

SMALL_VAE = FLUX_VAE | {"channels": 32, "levels": 1, "scale": 1, "blocks": 1, "channels_0": 32}
SMALL_VAE = {
    key: value for key, value in SMALL_VAE.items() if key not in ("channels_1", "channels_2", "channels_3")
}


def named(family: str, facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter in diffusers' layout: its shape."""
    shapes = LAYOUTS[family].parameters(facts)
    return {name: piece.shape(shapes[piece.key]) for name, piece in LAYOUTS[family].pieces(facts, "").items()}


def saved(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    shards: int = 1,
    stem: str = "diffusion_pytorch_model",
) -> Path:
    """Writes a model as diffusers does; with the stem "model", as transformers does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if shards == 1:
        write(folder / f"{stem}.safetensors", entries(shapes))
        return folder
    where = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        mine = dict(list(shapes.items())[number::shards])
        where |= dict.fromkeys(mine, name)
        write(folder / name, entries(mine))
    set_index(folder, where, stem)
    return folder


def set_index(folder: Path, where: Mapping[str, str], stem: str = "diffusion_pytorch_model") -> None:
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def index(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("*.safetensors.index.json")
    return json.loads(path.read_text())["weight_map"]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(model_roots(comfyui=tmp_path, user="xditd"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def flux(models: Path) -> Path:
    return saved(models / "diffusion_models" / "flux", named("flux", SMALL_FLUX), shards=3)


@pytest.fixture
def pipeline(models: Path) -> Path:
    """A whole Flux under checkpoints."""
    whole = models / "checkpoints" / "flux"
    saved(whole / "transformer", named("flux", SMALL_FLUX), shards=3)
    saved(whole / "vae", named("autoencoder_kl", SMALL_VAE))
    table = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (whole / "model_index.json").write_text(json.dumps(table))
    return whole


def refusal(
    catalog: Catalog, name: str = "flux", kind: str = "diffusion_models", part: str = ""
) -> XditError:
    with pytest.raises(XditError) as caught:
        catalog.find(ModelRef(kind=kind, name=name, part=part))
    return caught.value


def test_a_folder_of_shards_is_listed_as_one_model(catalog, flux):
    models, skipped = catalog.list("diffusion_models")
    assert [(info.name, info.family, info.variant) for info in models] == [("flux", "flux", "dev")]
    assert models[0].facts == SMALL_FLUX
    assert models[0].bytes == sum(path.stat().st_size for path in flux.glob("*.safetensors"))
    assert not skipped
    found = catalog.find(ModelRef(kind="unet", name="flux", size=models[0].bytes))
    assert (found.path, found.info) == (str(flux), models[0])


def test_a_pipeline_is_listed_once_for_each_part_and_each_is_found_in_its_folder(catalog, pipeline):
    models, skipped = catalog.list("checkpoints")
    assert {(info.name, info.part, info.family) for info in models} == {
        ("flux", "transformer", "flux"),
        ("flux", "vae", "autoencoder_kl"),
    }
    assert not skipped
    for part in ("transformer", "vae"):
        assert catalog.find(ModelRef(kind="checkpoints", name="flux", part=part)).path == str(pipeline / part)
    error = refusal(catalog, kind="checkpoints", part="t5xxl")
    assert (error.code, "it has transformer, vae" in error.message) == (Code.UNKNOWN_FAMILY, True)


def test_a_shard_by_itself_says_to_name_its_folder(catalog, flux):
    error = refusal(catalog, "flux/diffusion_pytorch_model-00002-of-00003.safetensors")
    assert (error.code, "name the folder" in error.message) == (Code.NOT_BUILT, True)


def test_files_beside_a_config_that_are_several_models_stay_files(catalog, models):
    folder = models / "vae" / "some"
    saved(folder, named("autoencoder_kl", SMALL_VAE))
    write(folder / "other.safetensors", entries(named("autoencoder_kl", SMALL_VAE)))
    assert {info.name for info in catalog.list("vae")[0]} == {
        "some/diffusion_pytorch_model.safetensors",
        "some/other.safetensors",
    }
    error = refusal(catalog, "some", "vae")
    assert (error.code, "is a folder, but no model" in error.message) == (Code.FILE_INVALID, True)


def test_a_config_beside_a_lora_makes_no_model_of_its_folder(catalog, models):
    pair = {"transformer.x.lora_A.weight": (4, 8), "transformer.x.lora_B.weight": (8, 4)}
    saved(models / "loras" / "ink", pair)
    assert [info.name for info in catalog.list("loras")[0]] == ["ink/diffusion_pytorch_model.safetensors"]


def test_shards_of_a_text_encoder_are_one_model(catalog, models):
    facts = {"width": 64, "layers": 2, "heads": 1, "head_dim": 64, "ff": 64, "vocabulary": 50, "gated": 1}
    saved(models / "text_encoders" / "t5", t5.parameters(facts), shards=2)
    (info,) = catalog.list("text_encoders")[0]
    assert (info.name, info.family) == ("t5", "t5")


def test_shards_in_the_makers_names_are_one_model(tmp_path):
    header = read_weights(saved(tmp_path / "flux", flux_family.parameters(SMALL_FLUX), 3, "model"))
    assert recognise(header, "transformer").facts == SMALL_FLUX
    assert len(header.files) == 3
    assert {entry.file for entry in header.tensors.values()} == {0, 1, 2}


@pytest.mark.parametrize(
    "lie",
    [
        {"img_in.weight": "../../etc/passwd"},
        {"img_in.weight": "gone.safetensors"},
        {"more.weight": "model-00001-of-00003.safetensors"},
    ],
    ids=["outside", "gone", "not in it"],
)
def test_an_index_that_lies_is_refused(tmp_path, lie):
    folder = saved(tmp_path / "flux", flux_family.parameters(SMALL_FLUX), 3, "model")
    set_index(folder, index(folder) | lie, "model")
    with pytest.raises(XditError) as caught:
        read_weights(folder)
    assert caught.value.code in (Code.FILE_INVALID, Code.MODEL_NOT_VISIBLE)


def test_a_missing_shard_is_named(catalog, flux):
    (flux / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    error = refusal(catalog)
    assert error.code is Code.FILE_INVALID
    assert "lacks diffusion_pytorch_model-00002-of-00003.safetensors, which its index names" in error.message
    (skipped,) = catalog.list("diffusion_models")[1]
    assert (skipped.name, skipped.code) == ("flux", "file_invalid")


def test_a_truncated_shard_is_named_and_a_mended_one_is_seen(catalog, flux):
    shard = flux / "diffusion_pytorch_model-00003-of-00003.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 7)
    error = refusal(catalog)
    assert (error.code, "00003-of-00003.safetensors is truncated: 7 bytes" in error.message) == (
        Code.FILE_INVALID,
        True,
    )
    with shard.open("r+b") as file:
        file.truncate(size)
    assert catalog.find(ModelRef(kind="unet", name="flux")).info.family == "flux"


@pytest.mark.parametrize(
    "shard", ["../../../../etc/passwd", "/etc/passwd", "../flux.safetensors", "sub/x.safetensors"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(catalog, flux, shard):
    write(flux.parent / "flux.safetensors", entries({"x_embedder.weight": (1,)}))
    set_index(flux, index(flux) | {"x_embedder.weight": shard})
    error = refusal(catalog)
    assert (error.code, "no shard beside it" in error.message) == (Code.FILE_INVALID, True)


def test_a_shard_that_is_a_link_out_of_the_model_folders_is_refused(catalog, flux, tmp_path):
    shard = flux / "diffusion_pytorch_model-00001-of-00003.safetensors"
    shard.rename(tmp_path / "away.safetensors")
    shard.symlink_to(tmp_path / "away.safetensors")
    assert refusal(catalog).code is Code.FILE_REFUSED
    assert [skipped.code for skipped in catalog.list("diffusion_models")[1]] == ["file_refused"]


@pytest.mark.parametrize("text", ["", "[]", '{"transformer": 3}'])
def test_a_model_index_that_is_none_gives_no_part(catalog, pipeline, text):
    (pipeline / "model_index.json").write_text(text)
    assert refusal(catalog, kind="checkpoints").code in (Code.FILE_INVALID, Code.UNKNOWN_FAMILY)


def truncate(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 7)


def quantise(folder: Path) -> None:
    quantised = {"encoder.block.0.layer.0.SelfAttention.q.weight.quant_state.bitsandbytes__nf4": (8,)}
    write(folder / "diffusion_pytorch_model.safetensors", entries(t5.parameters(TINY_T5) | quantised))


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (truncate, Code.FILE_INVALID, "text_encoder_2/diffusion_pytorch_model.safetensors is truncated"),
        (quantise, Code.NOT_BUILT, "text_encoder_2 is quantised as bitsandbytes' NF4"),
    ],
)
def test_a_pipelines_broken_text_encoder_says_what_is_wrong_with_it(catalog, pipeline, spoil, code, words):
    saved(pipeline / "text_encoder", clip.parameters(TINY_CLIP))
    saved(pipeline / "text_encoder_2", t5.parameters(TINY_T5))
    table = json.loads((pipeline / "model_index.json").read_text()) | {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(table))
    whole = {info.part for info in catalog.list("checkpoints")[0]}
    assert "t5xxl" in whole
    spoil(pipeline / "text_encoder_2")
    error = refusal(catalog, kind="checkpoints", part="t5xxl")
    assert (error.code, words in error.message) == (code, True), error.message
    models, skipped = catalog.list("checkpoints")
    assert {info.part for info in models} == whole - {"t5xxl"}
    assert [(each.name, each.code) for each in skipped] == [("flux", code.value)], "said once"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda shapes: shapes.pop("transformer_blocks.1.attn.to_k.weight"),
            "lacks transformer_blocks.1.attn.to_k.weight",
        ),
        (
            lambda shapes: shapes.update(
                {
                    "transformer_blocks.1.attn.to_k.weight": (128, 256),
                    "transformer_blocks.1.attn.to_q.weight": (384, 256),
                }
            ),
            "transformer_blocks.1.attn.to_",
        ),
        (lambda shapes: shapes.update({"transformer_blocks.1.attn.to_x.weight": (1,)}), "to_x.weight"),
        (lambda shapes: shapes.update({"x_embedder.weight": ()}), "x_embedder.weight is a single number"),
    ],
)
def test_what_does_not_fit_is_named_as_diffusers_names_it(spoil, words):
    shapes = named("flux", SMALL_FLUX)
    spoil(shapes)
    with pytest.raises(XditError) as caught:
        recognise(header_of(shapes), "transformer")
    assert caught.value.code in (Code.FILE_INVALID, Code.NOT_BUILT)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("family", "facts"),
    [("flux", FLUX_DEV), ("autoencoder_kl", FLUX_VAE), ("sdxl", SDXL)],
    ids=["flux", "vae", "sdxl"],
)
def test_the_real_models_are_known_by_diffusers_names(family, facts):
    shapes = named(family, facts)
    if family == "sdxl":
        shapes = {name.replace("class_embedding.", "add_embedding."): shape for name, shape in shapes.items()}
    found = recognise(header_of(shapes), "vae" if family == "autoencoder_kl" else "transformer")
    assert (found.family, found.facts) == (family, facts)


def test_older_names_of_a_vaes_attention_are_known():
    shapes = named("autoencoder_kl", FLUX_VAE)
    for ours, theirs in LAYOUTS["autoencoder_kl"].renamed.items():
        shapes = {name.replace(ours, theirs): shape for name, shape in shapes.items()}
    assert any(".proj_attn." in name for name in shapes)
    assert recognise(header_of(shapes), "vae").facts == FLUX_VAE
