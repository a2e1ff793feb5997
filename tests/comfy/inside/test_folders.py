"""Folders that diffusers saved, chosen in the loaders: they are offered, and give the numbers of the single files.

Where each of many models is a rank that starts, the tests are marked `soak`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import nodes
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_nodes import daemon, loaders, loras
from tests.comfy.inside import own
from tests.comfy.inside.conftest import CLIP_L, FLUX, T5, XFUSER_RANKS, Serve
from tests.comfy.inside.test_clip import apart
from tests.comfy.inside.texts import latent
from tests.live.service import Service
from xditd.catalog.layouts import LAYOUTS
from xditd.models.making import flux_facts, make_clip, make_flux, make_t5, make_vae, vae_facts
from xditd.models.reading import WeightFile
from xditd.protocol.errors import XditError

FITTING = {**FLUX, "context_width": T5["width"], "pooled_width": CLIP_L["width"]}
CLASSES = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}  # fmt: skip


def save(folder: Path, weights: Mapping[str, torch.Tensor], stem: str = "diffusion_pytorch_model") -> None:
    """As diffusers does, in two shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    where = {}
    for number in range(2):
        shard = dict(list(weights.items())[number::2])
        name = f"{stem}-{number + 1:05}-of-00002.safetensors"
        save_file({key: value.contiguous() for key, value in shard.items()}, folder / name)
        where |= dict.fromkeys(shard, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def renamed(path: Path, family: str, facts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """A makers' file's weights, as diffusers names them."""
    file = WeightFile(path)
    pieces = LAYOUTS[family].pieces(facts, "")
    return {name: file.value(piece, torch.float32) for name, piece in pieces.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single files and folders of the same weights under every kind, and all of them in one pipeline."""
    folder = tmp_path_factory.mktemp("models")
    unets, vaes, texts = (folder / kind for kind in ("diffusion_models", "vae", "text_encoders"))
    flux = make_flux(unets / "flux.safetensors", **FITTING, dtype=torch.float32)
    vae = make_vae(vaes / "ae.safetensors", dtype=torch.float32)
    make_clip(texts / "clip_l.safetensors", **CLIP_L, dtype=torch.float32, seed=4)
    make_t5(texts / "t5xxl.safetensors", **T5, dtype=torch.float32, seed=6)
    save(unets / "flux-folder", renamed(flux, "flux", flux_facts(**FITTING)))
    save(vaes / "ae-folder", renamed(vae, "autoencoder_kl", vae_facts()))
    for name in ("clip_l", "t5xxl"):
        save(texts / f"{name}-folder", load_file(texts / f"{name}.safetensors"), "model")
    whole = folder / "checkpoints" / "FLUX.1-small"
    for part, source in zip(
        CLASSES, (unets / "flux-folder", vaes / "ae-folder", texts / "clip_l-folder", texts / "t5xxl-folder"), strict=True
    ):  # fmt: skip
        shutil.copytree(source, whole / part)
    (whole / "model_index.json").write_text(
        json.dumps({part: ["diffusers", each] for part, each in CLASSES.items()})
    )
    shutil.copytree(whole, unets / "FLUX.1-small")
    shutil.copytree(whole, vaes / "FLUX.1-small")
    (folder / "loras").mkdir()
    shutil.copytree(vaes / "ae-folder", folder / "loras" / "ae-folder")
    for kind in folder.iterdir():
        folder_paths.add_model_folder_path(kind.name, str(kind))
    return folder


@pytest.fixture(scope="module")
def service(serve: Serve, folder: Path) -> Service:
    folders = {path.name: [str(path)] for path in folder.iterdir()}
    return serve(**{"debug.rank_command": XFUSER_RANKS, "models.folders": folders})


def options(loader: Any, name: str) -> list[str]:
    """What a loader's list offers."""
    (found,) = (each.options for each in loader.define_schema().inputs if each.id == name)
    return list(found)


LISTS = [
    ("diffusion_models", loaders.LoadUNet, ["unet_name"], {"flux-folder", "FLUX.1-small"}),
    ("vae", loaders.LoadVAE, ["vae_name"], {"ae-folder", "FLUX.1-small"}),
    ("checkpoints", loaders.LoadCheckpoint, ["ckpt_name"], {"FLUX.1-small"}),
    ("text_encoders", loaders.LoadCLIP, ["clip_name"], {"clip_l-folder", "t5xxl-folder"}),
    ("text_encoders", loaders.LoadDualCLIP, ["clip_name1", "clip_name2"], {"clip_l-folder", "t5xxl-folder"}),
    ("text_encoders", loaders.LoadTripleCLIP, ["clip_name1", "clip_name2", "clip_name3"], {"clip_l-folder"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "loader", "inputs", "expected"), LISTS, ids=lambda value: str(value)[:20])
def test_folders_are_offered_though_no_daemon_is_there(
    folder: Path, kind: str, loader: Any, inputs: list[str], expected: set[str]
) -> None:
    assert not any(
        expected & set(folder_paths.get_filename_list(each)) for each in folder_paths.folder_names_and_paths
    )
    for name in inputs:
        offered = options(loader, name)
        assert expected <= set(offered)
        assert set(folder_paths.get_filename_list(kind)) <= set(offered)
        assert "." in offered[0], "a file first, as ever: it is what a new node has chosen"
        assert kind == "text_encoders" or not any(each.endswith("FLUX.1-small/vae") for each in offered)


def test_a_folder_that_came_later_is_offered_too(folder: Path) -> None:
    assert "later" not in options(loaders.LoadVAE, "vae_name")
    shutil.copytree(folder / "vae" / "ae-folder", folder / "vae" / "later")
    assert "later" in options(loaders.LoadVAE, "vae_name")
    shutil.rmtree(folder / "vae" / "later")
    assert "later" not in options(loaders.LoadVAE, "vae_name")


def test_no_lora_is_a_folder(folder: Path) -> None:
    assert "ae-folder" not in options(loras.LoadLoRA, "lora_name")


@pytest.mark.parametrize(
    ("kind", "loader", "inputs"), [row[:3] for row in LISTS[:4]], ids=lambda value: str(value)[:20]
)
def test_the_daemon_lists_what_is_offered(
    service: Service, folder: Path, kind: str, loader: Any, inputs: list[str]
) -> None:
    offered = {name for name in options(loader, inputs[0]) if (folder / kind / name).is_dir()}
    models = daemon.client(service.endpoint).models(kind).models
    assert offered == {model.name for model in models if (folder / kind / model.name).is_dir()} != set()


def sample(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    context, pooled = (
        torch.randn(1, 24, T5["width"], generator=generator),
        torch.randn(1, CLIP_L["width"], generator=generator),
    )
    given = [[context, {"pooled_output": pooled}]]
    result: torch.Tensor = nodes.common_ksampler(model, 1, 3, 1.0, "euler", "simple", given, given, latent())[
        0
    ]["samples"]
    return result


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.std())
    print(f"max difference over std: {error:.1e}")
    return error


BOUND = 1e-5
"""Of the spread: on a CPU weights are used where they lie in their files, and their alignment rounds a product."""


def unet(service: Service, name: str) -> Any:
    return loaders.LoadUNet.execute(name, "default", endpoint=service.endpoint).result[0]


def decoded(vae: Any) -> torch.Tensor:
    samples = torch.randn(1, 16, 8, 9, generator=torch.Generator().manual_seed(2))
    image: torch.Tensor = nodes.VAEDecode().decode(vae, {"samples": samples})[0]
    return image


def vae(service: Service, name: str) -> Any:
    return loaders.LoadVAE.execute(name, endpoint=service.endpoint).result[0]


def clip(service: Service, *names: str) -> Any:
    named = dict(zip(("clip_name1", "clip_name2"), names, strict=True))
    return loaders.LoadDualCLIP.execute("flux", endpoint=service.endpoint, **named).result[0]


def encoded(clip: Any) -> Any:
    return nodes.CLIPTextEncode().encode(clip, "a red (circle:1.3) left of a blue square")[0]


def test_a_folders_model_gives_comfyuis_latent_of_the_file(service: Service, folder: Path) -> None:
    local = own.model(folder / "diffusion_models" / "flux.safetensors")
    assert far(sample(unet(service, "flux-folder")), sample(local)) <= BOUND


@pytest.mark.soak
def test_a_pipelines_model_gives_the_files_latent(service: Service) -> None:
    assert far(sample(unet(service, "FLUX.1-small")), sample(unet(service, "flux.safetensors"))) <= BOUND


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ae-folder", "FLUX.1-small"])
def test_a_folders_vae_gives_the_files_picture(service: Service, name: str) -> None:
    assert far(decoded(vae(service, name)), decoded(vae(service, "ae.safetensors"))) <= BOUND


@pytest.mark.soak
def test_folders_of_text_encoders_give_the_files_conditioning(service: Service) -> None:
    ours = encoded(clip(service, "clip_l-folder", "t5xxl-folder"))
    assert apart(ours, encoded(clip(service, "clip_l.safetensors", "t5xxl.safetensors"))) <= BOUND


@pytest.mark.soak
def test_a_pipeline_is_a_whole_checkpoint(service: Service) -> None:
    model, texts, pictures, dispatcher = loaders.LoadCheckpoint.execute(
        "FLUX.1-small", endpoint=service.endpoint
    ).result
    assert dispatcher.model.name == "FLUX.1-small"
    assert far(sample(model), sample(unet(service, "flux.safetensors"))) <= BOUND
    assert far(decoded(pictures), decoded(vae(service, "ae.safetensors"))) <= BOUND
    assert apart(encoded(texts), encoded(clip(service, "clip_l.safetensors", "t5xxl.safetensors"))) <= BOUND


def test_a_folder_that_is_another_where_comfyui_is_is_refused(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    """As a file of another size is: the daemon must not load something else of that name."""
    other = tmp_path / "vae" / "ae-folder"
    shutil.copytree(folder / "vae" / "ae-folder", other)
    (shard,) = other.glob("*-00002-of-00002.safetensors")
    weights = load_file(shard)
    save_file({**weights, "more": torch.zeros(9)}, shard)
    roots = folder_paths.folder_names_and_paths["vae"][0]
    roots.insert(0, str(other.parent))
    try:
        with pytest.raises(XditError, match=r"ae-folder has .* bytes where you are"):
            vae(service, "ae-folder")
    finally:
        roots.remove(str(other.parent))
