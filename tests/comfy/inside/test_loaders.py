"""The loader nodes, called as ComfyUI calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import nodes
import pytest
import torch

from comfy_nodes import daemon, loaders
from tests.comfy.inside.conftest import CLIP_L, FLUX, T5, XFUSER_RANKS, Serve
from tests.comfy.inside.texts import latent
from tests.live.service import Service
from xditd.models.making import clip_facts, flux_facts, make_checkpoint, make_flux, t5_facts
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
        ({"strategy": "PipeFusion"}, "PipeFusion"),
        ({"fallback": True}, "fallback"),
        ({"allow_approximate": True}, "approximate"),
        ({"gpu_devices": "0,0"}, "twice"),
        ({"gpu_devices": "all"}, "names no device"),
        ({"weight_dtype": "fp8_e5m2"}, "fp8_e5m2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_choice_that_cannot_be_is_refused_before_the_daemon_is_asked(
    choice: dict[str, Any], word: str
) -> None:
    nobody = {"weight_dtype": "default", "endpoint": "ipc:///nobody/there.sock", **choice}
    with pytest.raises(XditError, match=word):
        loaders.LoadUNet.execute(folder_paths.get_filename_list("diffusion_models")[0], **nobody)


def test_a_chinese_comma_is_a_comma_too() -> None:
    assert loaders.device_names("0，1, 2") == ("0", "1", "2")
