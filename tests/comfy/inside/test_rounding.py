"""In bfloat16 a rank's prediction is as far off ComfyUI's float32 as ComfyUI's own bfloat16 is, and not further."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy.inside import own
from tests.comfy.inside.conftest import XFUSER_RANKS, Serve
from tests.comfy.inside.test_families import KINDS, load, once, sizes
from tests.live.service import Service
from xditd.protocol.messages import PlanRequest

BOUND = 2
"""How many times ComfyUI's own error a rank's may be."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are in bfloat16 already, so that all computes with the same weights."""
    folder = tmp_path_factory.mktemp("rounding")
    for name, kind in KINDS.items():
        path = kind.make(folder / f"{name}.safetensors")
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    return folder


@pytest.fixture(scope="module")
def service(serve: Serve, folder: Path) -> Service:
    folders = {"diffusion_models": [str(folder)]}
    return serve(
        **{"debug.rank_command": XFUSER_RANKS, "compute.dtype": "bfloat16", "models.folders": folders}
    )


def off(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_within_comfyuis_noise_floor(
    service: Service, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family, path = name.partition("_")[0], folder / f"{name}.safetensors"
    right, theirs = (own.known(family, path, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = load(service, name, PlanRequest())
    for size in sizes(name):
        expected = once(right, name, size)
        floor, found = (off(once(model, name, size), expected) for model in (theirs, ours))
        with capsys.disabled():
            print(f"\n  {name}, {size[0]}×{size[1]}: {found:.1e}, ComfyUI's own {floor:.1e}", end="")
        assert 0 < found <= BOUND * floor
        assert floor > 1e-4, "else nothing was computed in bfloat16"
