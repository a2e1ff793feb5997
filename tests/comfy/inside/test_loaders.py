"""The loader nodes, called as ComfyUI calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.hydit
import folder_paths
import nodes
import pytest
import torch
from comfy_extras import nodes_clip_sdxl, nodes_hunyuan
from safetensors.torch import load_file

from comfy_nodes import daemon, loaders, samplers
from tests.comfy.inside import own
from tests.comfy.inside.conftest import BERT, CLIP_G, CLIP_L, FLUX, MT5, T5, XFUSER_RANKS, Serve, pieces
from tests.comfy.inside.test_clip import CONFIGS, apart
from tests.comfy.inside.test_families import far
from tests.comfy.inside.test_model import call
from tests.comfy.inside.texts import latent
from tests.live.service import Service
from xditd.models.making import bert_facts, clip_facts, flux_facts, make_checkpoint, make_flux, t5_facts
from xditd.models.making_checkpoints import make_hunyuandit_checkpoint, make_sdxl_checkpoint
from xditd.models.making_transformers import hunyuandit_facts, sdxl_facts
from xditd.protocol.errors import XditError

FITTING = {**FLUX, "context_width": T5["width"], "pooled_width": CLIP_L["width"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(
        folder / "checkpoints" / "whole.safetensors",
        transformer=flux_facts(**FITTING),
        clip_l=clip_facts(**CLIP_L),
        t5xxl=t5_facts(**T5),
        dtype=torch.float32,
    )
    make_flux(
        folder / "checkpoints" / "bare.safetensors",
        **FITTING,
        dtype=torch.float32,
        prefix="model.diffusion_model.",
    )
    make_sdxl_checkpoint(
        folder / "checkpoints" / "sdxl.safetensors",
        transformer=sdxl_facts(context_width=CLIP_L["width"] + CLIP_G["width"]),
        clip_l=clip_facts(**CLIP_L, projection=False),
        clip_g=clip_facts(**CLIP_G, openclip=True),
        dtype=torch.float32,
    )
    hunyuan: dict[str, Any] = {
        "transformer": hunyuandit_facts(context_width=BERT["width"], t5_width=MT5["width"]),
        "hydit_clip": bert_facts(**BERT),
        "mt5xl": t5_facts(**MT5),
        "dtype": torch.float32,
    }
    whole, without = (
        folder / "checkpoints" / f"{name}.safetensors"
        for name in ("hunyuan_dit_1.2", "hunyuan_without_tokenizer")
    )
    make_hunyuandit_checkpoint(whole, **hunyuan, spiece_model=pieces())
    make_hunyuandit_checkpoint(without, **hunyuan)
    folder_paths.add_model_folder_path("checkpoints", str(folder / "checkpoints"))
    return folder


@pytest.fixture(scope="module")
def service(serve: Serve, folder: Path) -> Service:
    return serve(
        **{
            "debug.rank_command": XFUSER_RANKS,
            "models.folders": {"checkpoints": [str(folder / "checkpoints")]},
        }
    )


def checkpoint(service: Service, name: str) -> Any:
    return loaders.LoadCheckpoint.execute(name, endpoint=service.endpoint).result


def sample(model: Any, positive: Any) -> torch.Tensor:
    result: torch.Tensor = nodes.common_ksampler(
        model, 1, 2, 1.0, "euler", "simple", positive, positive, latent()
    )[0]["samples"]
    return result


def test_a_checkpoint_is_a_model_a_clip_and_a_vae(service: Service) -> None:
    model, clip, vae, dispatcher = checkpoint(service, "whole.safetensors")
    samples = sample(model, nodes.CLIPTextEncode().encode(clip, "a red circle")[0])
    assert nodes.VAEDecode().decode(vae, {"samples": samples})[0].shape == (1, 96, 80, 3)
    assert dispatcher.model.kind == "checkpoints"


def test_a_conditioning_without_a_prompt_gets_what_an_empty_prompt_gives(service: Service) -> None:
    model, clip, _, _ = checkpoint(service, "whole.safetensors")
    empty = nodes.CLIPTextEncode().encode(clip, "")[0]
    none = [[None, {}]]
    none[0][1]["pooled_output"] = None
    assert torch.equal(sample(model, none), sample(model, empty))


def test_a_checkpoint_without_texts_or_vae_is_a_model(service: Service) -> None:
    model, clip, vae, _ = checkpoint(service, "bare.safetensors")
    assert model is not None
    assert clip is None
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        vae.decode(latent()["samples"])


def test_an_sdxl_checkpoint_gives_comfyuis_texts_and_images(service: Service, folder: Path) -> None:
    """Its CLIP-G is in OpenCLIP's layout, and has another one's projection."""
    path = folder / "checkpoints" / "sdxl.safetensors"
    model, clip, vae, _ = checkpoint(service, path.name)
    weights = load_file(path)
    texts = comfy.supported_models.SDXL({}).process_clip_state_dict(dict(weights))
    local = clip_of(clip, comfy.sdxl_clip.SDXLClipModel, texts, ("clip_l", "clip_g"))
    ours, theirs = (
        call(
            nodes_clip_sdxl.CLIPTextEncodeSDXL, each, 96, 80, 0, 0, 96, 80, "a red circle", "left of (it:1.3)"
        )
        for each in (clip, local)
    )
    assert apart(ours, theirs) <= 3e-5
    pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(1))  # so wide the UNet takes it
    for text in (ours, theirs):
        text[0][1]["pooled_output"] = pooled
    own_model = own.sdxl(path, "model.diffusion_model.")
    error = far(samples(model, ours, 4), samples(own_model, theirs, 4))
    print(f"latents: {error:.1e}")
    assert error <= 3e-5
    assert nodes.VAEDecode().decode(vae, {"samples": samples(model, ours, 4)})[0].shape == (1, 96, 80, 3)


def test_a_hunyuandit_checkpoint_gives_comfyuis_texts_and_images(service: Service, folder: Path) -> None:
    """All of hunyuan_dit_1.2.safetensors: BERT, mT5 and its tokenizer, the transformer and the VAE."""
    path = folder / "checkpoints" / "hunyuan_dit_1.2.safetensors"
    model, clip, vae, _ = checkpoint(service, path.name)
    texts = own.below(load_file(path), "text_encoders.")
    local = clip_of(clip, comfy.text_encoders.hydit.HyditModel, texts, ("hydit_clip", "mt5xl"))
    ours, theirs = (
        call(nodes_hunyuan.CLIPTextEncodeHunyuanDiT, each, "a red circle", "蓝色方块左边的红色圆圈")
        for each in (clip, local)
    )
    assert apart(ours, theirs) <= 3e-5
    error = far(samples(model, ours, 4), samples(own.hunyuandit(path, "model."), theirs, 4))
    print(f"latents: {error:.1e}")
    assert error <= 3e-5
    assert nodes.VAEDecode().decode(vae, {"samples": samples(model, ours, 4)})[0].shape == (1, 96, 80, 3)


def test_an_mt5_without_its_tokenizer_is_refused(service: Service, folder: Path) -> None:
    with pytest.raises(XditError, match="no spiece_model"):
        checkpoint(service, "hunyuan_without_tokenizer.safetensors")


def clip_of(remote: Any, kind: Any, texts: dict[str, torch.Tensor], names: tuple[str, ...]) -> Any:
    """A CLIP of ComfyUI's own class with weights of a checkpoint, else as the one from the daemon."""
    stage = kind(dtype=torch.float32, model_options=CONFIGS)
    for name in names:
        encoder = own.below(texts, f"{name}.transformer.")
        missing, _ = getattr(stage, name).transformer.load_state_dict(encoder, strict=False)
        assert set(missing) <= {"text_projection.weight"}
        if missing:
            getattr(stage, name).transformer.text_projection.weight.data.copy_(
                torch.eye(encoder["text_model.final_layer_norm.bias"].shape[0])
            )
    local = comfy.sd.CLIP(no_init=True)
    vars(local).update(vars(remote))
    local.cond_stage_model = stage
    local.patcher = comfy.model_patcher.ModelPatcher(stage, torch.device("cpu"), torch.device("cpu"))
    return local


def samples(model: Any, positive: Any, channels: int) -> torch.Tensor:
    given = {"samples": torch.zeros(1, channels, 12, 10)}
    result: torch.Tensor = nodes.common_ksampler(
        model, 1, 3, 1.0, "euler", "simple", positive, positive, given
    )[0]["samples"]
    return result


def test_loading_again_finds_it_warm(service: Service) -> None:
    client = daemon.client(service.endpoint)
    checkpoint(service, "whole.safetensors")
    before = {rank.pid for group in client.status().groups for rank in group.ranks}
    checkpoint(service, "whole.safetensors")
    assert {rank.pid for group in client.status().groups for rank in group.ranks} == before


def test_a_file_that_the_daemon_does_not_see_is_named(service: Service, folder: Path) -> None:
    make_flux(folder / "elsewhere" / "diffusion_models" / "hidden.safetensors", **FITTING)
    folder_paths.add_model_folder_path("diffusion_models", str(folder / "elsewhere" / "diffusion_models"))
    with pytest.raises(XditError, match=r"hidden\.safetensors.*model_not_visible"):
        loaders.LoadUNet.execute("hidden.safetensors", "default", endpoint=service.endpoint)


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ({"allow_approximate": True}, "approximate"),
        ({"gpu_devices": "0,0"}, "twice"),
        ({"gpu_devices": "all"}, "names no device"),
        ({"weight_dtype": "fp8_e4m3fn_fast"}, "choose fp8_e4m3fn, which keeps the same weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_choice_that_cannot_be_is_refused_before_the_daemon_is_asked(
    choice: dict[str, Any], word: str
) -> None:
    nobody = {"weight_dtype": "default", "endpoint": "ipc:///nobody/there.sock", **choice}
    with pytest.raises(XditError, match=word):
        loaders.LoadUNet.execute(folder_paths.get_filename_list("diffusion_models")[0], **nobody)


@pytest.mark.parametrize(
    ("choices", "fallback"),
    [({"fallback": True}, "auto"), ({"fallback": False}, "never"), ({}, "never")],
    ids=str,
)
def test_the_switch_fallback_is_asked_of_the_daemon(choices: dict[str, Any], fallback: str) -> None:
    assert loaders._plan(choices).fallback == fallback


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the nodes say."""
    lines: list[str] = []
    for module in (loaders, samplers):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


def test_fewer_devices_than_were_asked_for_are_said_on_the_loader_and_on_the_sampler(
    serve: Serve, service: Service, folder: Path, said: list[str]
) -> None:
    """The second of two ranks does not start, and the latent is that of one device all the same."""
    lame = serve(
        **{
            "debug.rank_command": XFUSER_RANKS,
            "debug.rank_options": {"only_rank": "1", "fail_at_load": "1"},
            "devices.cpu_ranks": 2,
            "models.folders": {"checkpoints": [str(folder / "checkpoints")]},
        }
    )
    asked = {"strategy": "USP", "endpoint": lame.endpoint}
    with pytest.raises(XditError, match="A fault that a test asked for"):
        loaders.LoadCheckpoint.execute("bare.safetensors", **asked)
    model, _, _, dispatcher = loaders.LoadCheckpoint.execute(
        "bare.safetensors", fallback=True, **asked
    ).result
    degraded = "degraded: ulysses 2 on cpu:0, cpu:1 could not be had"
    (line,) = said
    assert line.startswith("⚠️ bare.safetensors loaded in ")
    assert " on cpu:0; " in line
    assert degraded in line
    said.clear()
    context, pooled = torch.randn(1, 24, T5["width"]), torch.randn(1, CLIP_L["width"])
    given = [[context, {"pooled_output": pooled}]]
    shared = dict(zip(samplers.SHARED, (2, 1.0, "euler", "simple", given, given, latent()), strict=True))
    (ours,) = samplers.KSampler.execute(1, 1.0, model=model, dispatcher=dispatcher, **shared).result
    (line,) = said
    assert line.startswith("⚠️ cpu:0 (")
    assert degraded in line
    assert torch.equal(ours["samples"], sample(checkpoint(service, "bare.safetensors")[0], given))


def test_a_chinese_comma_is_a_comma_too() -> None:
    assert loaders.device_names("0，1, 2") == ("0", "1", "2")


def test_gguf_files_are_offered_beside_those_that_comfyui_lists(tmp_path: Path) -> None:
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    (tmp_path / "flux-Q4_K.gguf").touch()
    (tmp_path / "flux.safetensors").touch()
    (unet_name, *_) = loaders.LoadUNet.define_schema().inputs
    assert {"flux-Q4_K.gguf", "flux.safetensors"} <= set(unet_name.options)
