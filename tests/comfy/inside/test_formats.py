"""Scaled fp8: the daemon's numbers are those of ComfyUI's own loader of the same file."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy.inside.conftest import XFUSER_RANKS, Serve
from tests.comfy.inside.test_families import BOUND, KINDS, far, load, once
from xditd.protocol.messages import PlanRequest

NAME = "sd3"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 as ComfyUI's own scaled fp8 files are: matrices in fp8, each with its scale."""
    folder = tmp_path_factory.mktemp("fp8")
    weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in load_file(KINDS[NAME].make(folder / "plain.safetensors")).items():
        # ComfyUI 0.3.64 rounds the biases of such layers to fp8 as it loads them; later ones do not.
        weights[key] = value.to(torch.float8_e4m3fn).float() if key.endswith("bias") else value
        if value.ndim == 2:
            scale = value.abs().max() / 448
            weights[key] = (value / scale).to(torch.float8_e4m3fn)
            weights[key.removesuffix("weight") + "scale_weight"] = scale
    path = folder / "models" / f"{NAME}.safetensors"
    path.parent.mkdir()
    save_file(weights, path)
    return path


def test_scaled_fp8_gives_comfyuis_numbers(
    serve: Serve, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"diffusion_models": [str(path.parent)]}
    service = serve(**{"debug.rank_command": XFUSER_RANKS, "devices.cpu_ranks": 2, "models.folders": folders})
    # As the daemon computes on a CPU; ComfyUI would keep biases in 16 bits there.
    options = {"dtype": torch.float32}
    local = comfy.sd.load_diffusion_model(str(path), model_options=options)
    plain = comfy.sd.load_diffusion_model(str(path.parents[1] / "plain.safetensors"), model_options=options)
    expected = once(local, NAME, KINDS[NAME].size)
    difference = far(once(load(service, NAME, PlanRequest(ulysses=2)), NAME, KINDS[NAME].size), expected)
    with capsys.disabled():
        print(
            f"\n  scaled fp8: {difference:.1e} off ComfyUI's, which is {far(once(plain, NAME, KINDS[NAME].size), expected):.1e} off the bf16 of it"
        )
    assert difference <= BOUND
    assert far(once(plain, NAME, KINDS[NAME].size), expected) > 100 * BOUND
