"""From a name to a file and what it is; every file that is none is listed with its reason."""

from __future__ import annotations

import os
import pickle
import time

import msgspec
import pytest

from tests.catalog.sparse_files import (
    FLUX_DEV,
    FLUX_VAE,
    SDXL_VAE,
    SMALL_FLUX,
    entries,
    prefixed,
    write,
    write_flux,
    write_vae,
)
from xditd.catalog import catalog as catalog_module
from xditd.catalog.catalog import Catalog
from xditd.catalog.families import autoencoder_kl, flux
from xditd.catalog.roots import model_roots
from xditd.protocol.codec import MAX_HEADER
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef
from xditd.protocol.plans import LoraMatch, LoraRef


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def catalog(tmp_path):
    return Catalog(model_roots(comfyui=tmp_path, user="xditd"))


def refusal(catalog: Catalog, **ref) -> XditError:
    with pytest.raises(XditError) as caught:
        catalog.find(ModelRef(**ref))
    return caught.value


def write_checkpoint(path, facts=SMALL_FLUX, vae=FLUX_VAE):
    table = entries(prefixed("model.diffusion_model.", flux.parameters(facts)))
    end = max(entry["data_offsets"][1] for entry in table.values())
    return write(path, table | entries(prefixed("vae.", autoencoder_kl.parameters(vae)), "F32", begin=end))


def test_a_model_is_found_by_the_name_that_comfyui_gives_it(catalog, models):
    path = write_flux(models / "unet" / "flux" / "dev.safetensors", FLUX_DEV)
    found = catalog.find(ModelRef(kind="unet", name="flux/dev.safetensors", size=path.stat().st_size))
    assert (found.path, found.prefix) == (str(path), "")
    info = found.info
    assert (info.kind, info.name, info.part) == ("diffusion_models", "flux/dev.safetensors", "transformer")
    assert (info.family, info.variant, info.dtype) == ("flux", "dev", "bfloat16")
    assert info.bytes == path.stat().st_size
    assert info.facts == FLUX_DEV


def test_a_checkpoint_has_two_parts(catalog, models):
    write_checkpoint(models / "checkpoints" / "all.safetensors")
    for part, family, prefix in (
        ("", "flux", "model.diffusion_model."),
        ("transformer", "flux", "model.diffusion_model."),
        ("vae", "autoencoder_kl", "vae."),
    ):
        found = catalog.find(ModelRef(kind="checkpoints", name="all.safetensors", part=part))
        assert (found.info.family, found.prefix) == (family, prefix)
    listed, skipped = catalog.list()
    assert [info.part for info in listed] == ["transformer", "vae"]
    assert skipped == ()


def test_a_part_that_cannot_be_is_refused(catalog, models):
    write_flux(models / "unet" / "dev.safetensors")
    write_flux(models / "checkpoints" / "dev.safetensors")
    error = refusal(catalog, kind="unet", name="dev.safetensors", part="vae")
    assert (error.code, "transformer" in error.message) == (Code.BAD_VALUE, True)
    error = refusal(catalog, kind="checkpoints", name="dev.safetensors", part="vae")
    assert error.code is Code.UNKNOWN_FAMILY
    assert "holds a Flux transformer, and no vae" in error.message


def test_another_file_of_that_name_is_not_the_one(catalog, models):
    path = write_vae(models / "vae" / "ae.safetensors")
    error = refusal(catalog, kind="vae", name="ae.safetensors", size=17)
    assert error.code is Code.MODEL_NOT_VISIBLE
    assert "another file of that name" in error.message
    assert str(path.stat().st_size) in error.message


def test_of_several_files_of_a_name_the_one_of_that_size_is_meant(catalog, models):
    first = write_flux(models / "unet" / "dev.safetensors")
    second = write_flux(models / "diffusion_models" / "dev.safetensors", SMALL_FLUX | {"single_blocks": 1})
    assert catalog.find(ModelRef(kind="unet", name="dev.safetensors")).path == str(first)
    found = catalog.find(ModelRef(kind="unet", name="dev.safetensors", size=second.stat().st_size))
    assert found.path == str(second)


def test_a_dtype_that_nothing_computes_in_is_refused(catalog, models):
    write_flux(models / "unet" / "dev.safetensors")
    assert refusal(catalog, kind="unet", name="dev.safetensors", dtype="int8").code is Code.BAD_VALUE
    assert catalog.find(ModelRef(kind="unet", name="dev.safetensors", dtype="float16"))


LORA = {
    f"lora_unet_double_blocks_0_img_attn_proj.lora_{half}.weight": shape
    for half, shape in (("up", (256, 4)), ("down", (4, 256)))
}


def test_loras_are_listed_with_the_family_that_they_are_for(catalog, models):
    write(models / "loras" / "ink.safetensors", entries(LORA))
    write_flux(models / "loras" / "no-lora.safetensors")
    (lora,), (other,) = catalog.list("loras")
    assert (lora.kind, lora.name, lora.part, lora.family, lora.variant) == (
        "loras",
        "ink.safetensors",
        "lora",
        "lora",
        "flux",
    )
    assert (lora.facts, lora.parameters) == ({"modules": 1, "rank": 4}, 2048)
    assert (other.name, other.code) == ("no-lora.safetensors", "unknown_family")


def test_a_lora_is_no_model_to_load(catalog, models):
    write(models / "loras" / "ink.safetensors", entries(LORA))
    assert "ask for a model with it" in refusal(catalog, kind="loras", name="ink.safetensors").message


def test_a_lora_is_found_for_a_model_that_it_fits(catalog, models):
    write_flux(models / "unet" / "dev.safetensors")
    write(models / "loras" / "a" / "ink.safetensors", entries(LORA))
    model = catalog.find(ModelRef(kind="unet", name="dev.safetensors"))
    found = catalog.find_lora(LoraRef(name="a/ink.safetensors", strength=0.5), model)
    assert found.path == str(models / "loras" / "a" / "ink.safetensors")
    assert found.match == LoraMatch(name="a/ink.safetensors", strength=0.5, matched=1, modules=1)

    def refused(**changes) -> Code:
        with pytest.raises(XditError) as caught:
            catalog.find_lora(LoraRef(**({"name": "a/ink.safetensors"} | changes)), model)
        return caught.value.code

    assert refused(strength=float("nan")) is Code.BAD_VALUE
    assert refused(name="gone.safetensors") is Code.MODEL_NOT_VISIBLE
    assert refused(size=7) is Code.MODEL_NOT_VISIBLE  # another file of that name


def test_every_bad_file_is_listed_with_its_reason_and_none_stops_the_list(catalog, models, tmp_path):
    folder = models / "diffusion_models"
    write_flux(folder / "good.safetensors")
    write(folder / "cut.safetensors", entries(flux.parameters(SMALL_FLUX)), missing=5)
    write(
        folder / "sdxl.safetensors",
        entries({"input_blocks.0.0.weight": (1,), "label_emb.0.0.weight": (1, 2560)}),
    )
    write(folder / "strange.safetensors", entries({"a": (1,)}))
    (folder / "old.ckpt").write_bytes(pickle.dumps({}))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "link.safetensors").symlink_to(write_flux(tmp_path / "away.safetensors"))
    os.mkfifo(folder / "pipe.safetensors")
    (folder / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(b"")
    listed, skipped = catalog.list()
    assert [info.name for info in listed] == ["good.safetensors"]
    assert {file.name: file.code for file in skipped} == {
        "cut.safetensors": "file_invalid",
        "sdxl.safetensors": "not_built",
        "strange.safetensors": "unknown_family",
        "old.ckpt": "file_refused",
        "empty.safetensors": "file_invalid",
        "link.safetensors": "file_refused",
        "caf\\udce9.safetensors": "file_refused",
    }
    assert all(file.kind == "diffusion_models" and file.message for file in skipped)
    assert msgspec.msgpack.encode(skipped)


def test_a_checkpoint_is_skipped_for_what_is_wrong_and_not_for_what_it_lacks(catalog, models):
    folder = models / "checkpoints"
    write_flux(folder / "only a transformer.safetensors")
    write(folder / "nothing.safetensors", entries({"a": (1,)}))
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": (1,)}
    shapes = sdxl | prefixed("first_stage_model.", autoencoder_kl.parameters(SDXL_VAE))
    write(folder / "sd.safetensors", entries(shapes))
    listed, skipped = catalog.list("checkpoints")
    assert [(info.name, info.part) for info in listed] == [
        ("only a transformer.safetensors", "transformer"),
        ("sd.safetensors", "vae"),
    ]
    assert [(file.name, file.code) for file in skipped] == [
        ("nothing.safetensors", "unknown_family"),
        ("sd.safetensors", "not_built"),
    ]


def test_a_file_is_read_once_until_it_changes(catalog, models, monkeypatch):
    read = []
    real = catalog_module.read_weights
    monkeypatch.setattr(
        catalog_module, "read_weights", lambda path, name: read.append(name) or real(path, name)
    )
    path = write_flux(models / "unet" / "dev.safetensors")
    ref = ModelRef(kind="unet", name="dev.safetensors")
    for _ in range(3):
        catalog.find(ref)
        catalog.list()
    assert read == ["diffusion_models/dev.safetensors"]

    times = path.stat()
    other = write_flux(models / "new", SMALL_FLUX | {"guidance": 0})
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)
    assert catalog.find(ref).info.variant == "schnell"
    assert len(read) == 2


def test_a_refusal_is_remembered_too_until_the_file_is_mended(catalog, models):
    ref = {"kind": "vae", "name": "ae.safetensors"}
    write(models / "vae" / "ae.safetensors", entries(autoencoder_kl.parameters(FLUX_VAE)), missing=1)
    first, second = refusal(catalog, **ref), refusal(catalog, **ref)
    assert first.code is second.code is Code.FILE_INVALID
    assert first is not second, "an exception that is raised twice grows"
    write_vae(models / "vae" / "ae.safetensors")
    assert catalog.find(ModelRef(**ref)).info.family == "autoencoder_kl"


def test_a_name_that_is_not_there_names_folders_and_user(catalog, models):
    error = refusal(catalog, kind="vae", name="absent.safetensors")
    assert error.code is Code.MODEL_NOT_VISIBLE
    assert str(models / "vae") in error.message
    assert "user xditd" in error.message


def test_the_echo_is_there_only_where_it_was_asked_for(tmp_path, catalog):
    assert refusal(catalog, kind="echo", name="echo").code is Code.BAD_VALUE
    echoing = Catalog(model_roots(comfyui=tmp_path), echo=True)
    found = echoing.find(ModelRef(kind="echo", name="echo"))
    assert (found.path, found.info.family) == ("", "echo")
    assert [info.family for info in echoing.list()[0]] == ["echo"]
    assert [info.family for info in echoing.list("echo")[0]] == ["echo"]
    assert echoing.list("vae")[0] == ()


def test_hundreds_of_models_of_24_gigabytes_are_listed_in_seconds(catalog, models):
    first = write_flux(models / "unet" / "0.safetensors", FLUX_DEV)
    size = first.stat().st_size
    header = first.open("rb").read(200_000)
    for i in range(1, 200):
        with (models / "unet" / f"{i}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
    begin = time.perf_counter()
    assert len(catalog.list()[0]) == 200
    fresh = time.perf_counter() - begin
    begin = time.perf_counter()
    assert len(catalog.list()[0]) == 200
    again = time.perf_counter() - begin
    assert fresh < 20
    assert again < 2
    print(f"200 files of {size / 1e9:.1f} GB: {fresh:.2f} s, then {again:.3f} s")


def test_an_info_is_small_enough_for_dozens_in_an_answer(catalog, models):
    write_flux(models / "unet" / "dev.safetensors", FLUX_DEV)
    assert len(msgspec.msgpack.encode(catalog.list()[0])) * 100 < MAX_HEADER
