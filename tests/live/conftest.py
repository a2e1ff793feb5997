"""Real daemons for the stories in this folder, and small models in real files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.service import Service
from xditd.models.making import make_flux, make_vae

FLUX = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64}
VAE = {"width": 32, "multiples": (1, 1), "blocks": 1}

Serve = Callable[..., Service]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder as ComfyUI has it."""
    folder = tmp_path_factory.mktemp("models")
    make_flux(folder / "diffusion_models" / "flux.safetensors", **FLUX, dtype=torch.float32)
    make_vae(folder / "vae" / "ae.safetensors", **VAE, dtype=torch.float32)
    return folder


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Serve]:
    """Starts daemons with settings by dotted key; whatever the test leaves running is killed."""
    services: list[Service] = []

    def start(
        folder: Path | None = None, environment: dict[str, str] | None = None, **settings: Any
    ) -> Service:
        base = {
            "debug.echo": True,
            "devices.kind": "cpu",
            "arena.first_bytes": "4MiB",
            "models.folders": {kind: [str(models / kind)] for kind in ("diffusion_models", "vae")},
        }
        service = Service(folder or tmp_path_factory.mktemp("s"), {**base, **settings}, environment)
        services.append(service)
        return service

    yield start
    for service in services:
        if service.process.poll() is None:
            service.kill()
