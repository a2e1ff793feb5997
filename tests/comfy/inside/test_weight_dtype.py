"""Load UNet's weight_dtype: the daemon's numbers are those of ComfyUI's own loader with the same choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import nodes
import pytest
import torch

from comfy_nodes import loaders, status
from comfy_nodes.dispatcher import WEIGHT_DTYPES
from tests.comfy.inside import own
from tests.comfy.inside.conftest import FLUX, XFUSER_RANKS, Serve
from tests.comfy.inside.test_families import BOUND, KINDS, far, once
from tests.live.service import Service
from xditd.models.making import make_flux
from xditd.protocol.errors import XditError

CHOICES = ("fp8_e4m3fn", "fp8_e5m2")
LOADED = ("sd3.5_medium", "pixart_sigma", "pixart_alpha")
"""Small models that ComfyUI's own loader takes. Of the others it has its own classes built."""

FAMILIES = (*LOADED, "hunyuandit_1.1", "sdxl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight_dtype") / "diffusion_models"
    for name in FAMILIES:
        KINDS[name].make(folder / f"{name}.safetensors")
    make_flux(folder / "flux.safetensors", **FLUX, dtype=torch.float32)
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    return folder


@pytest.fixture
def service(serve: Serve, folder: Path) -> Service:
    folders = {"diffusion_models": [str(folder)]}
    return serve(**{"debug.rank_command": XFUSER_RANKS, "devices.cpu_ranks": 2, "models.folders": folders})


def theirs(path: Path, dtype: torch.dtype) -> Any:
    """As UNETLoader has it with a weight_dtype: on a CPU it computes in float32 then, as the daemon does."""
    if path.stem in LOADED:
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
    if path.stem == "flux":
        return own.model(path, own.flux(path, dtype))
    return own.known(path.stem.partition("_")[0], path, dtype)


def ours(service: Service, name: str, choice: str) -> Any:
    devices = {"gpu_devices": "0"} if name == "sdxl" else {"strategy": "USP"}
    model, dispatcher = loaders.LoadUNet.execute(
        f"{name}.safetensors", choice, endpoint=service.endpoint, **devices
    ).result
    assert dispatcher.plan.weight_dtype == WEIGHT_DTYPES[choice]
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_choice_gives_comfyuis_numbers(
    service: Service, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, size = folder / f"{name}.safetensors", KINDS[name].size
    plain = once(theirs(path, torch.float32), name, size)
    figures = []
    for choice in CHOICES:
        expected = once(theirs(path, getattr(torch, WEIGHT_DTYPES[choice])), name, size)
        figures.append((far(once(ours(service, name, choice), name, size), expected), far(plain, expected)))
    with capsys.disabled():
        told = (f"{choice} {near:.1e} off ComfyUI's, which is {off:.1e} off the weights of the file" for choice, (near, off) in zip(CHOICES, figures, strict=True))  # fmt: skip
        print(f"\n  {name}: {'; '.join(told)}", end="")
    assert max(near for near, _ in figures) <= BOUND
    assert min(off for _, off in figures) > 100 * BOUND, "else nothing was rounded"


def test_flux_goes_through_a_ksampler_to_comfyuis_latent(
    service: Service, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def latent(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        context = torch.randn(1, 24, FLUX["context_width"], generator=generator)
        text = [[context, {"pooled_output": torch.randn(1, FLUX["pooled_width"], generator=generator)}]]
        empty = {"samples": torch.zeros(1, 16, 12, 10)}
        made: torch.Tensor = nodes.common_ksampler(model, 5, 4, 1.0, "euler", "simple", text, text, empty)[0]["samples"]  # fmt: skip
        return made

    path = folder / "flux.safetensors"
    model = ours(service, "flux", "fp8_e4m3fn")
    with service.client() as client:
        assert " in float32, weights in float8_e4m3fn" in status.describe(client.status())
    expected = latent(theirs(path, torch.float8_e4m3fn))
    error = far(latent(model), expected)
    rounding = far(latent(theirs(path, torch.float32)), expected)
    with capsys.disabled():
        print(f"\n  flux, four steps: {error:.1e} off ComfyUI's, which is {rounding:.1e} off the weights of the file", end="")  # fmt: skip
    assert error <= BOUND < rounding / 100


def test_arithmetic_in_fp8_is_refused_and_what_to_choose_is_said(service: Service, folder: Path) -> None:
    with pytest.raises(XditError, match="choose fp8_e4m3fn, which keeps the same weights"):
        loaders.LoadUNet.execute("pixart_sigma.safetensors", "fp8_e4m3fn_fast", endpoint=service.endpoint)
    with service.client() as client:
        assert not client.status().groups
