"""Daemons and models for the tests within ComfyUI.

Two kinds of ranks: ComfyUI's own module, with which nothing may differ, and xditd's own with xfuser.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.inside import own

own.enter()

import sentencepiece  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from comfy_nodes import daemon  # noqa: E402
from comfy_nodes.dispatcher import Dispatcher  # noqa: E402
from comfy_nodes.patcher import make_model  # noqa: E402
from tests.live.service import Service  # noqa: E402
from xditd.models.making import make_bert, make_clip, make_flux, make_t5, make_vae  # noqa: E402
from xditd.protocol.messages import ModelRef, PlanRequest  # noqa: E402

torch.set_num_threads(1)  # as the ranks have it: the last bits of a matrix product depend on it

FLUX = {
    "heads": 2,
    "head_dim": 128,
    "double_blocks": 1,
    "single_blocks": 1,
    "context_width": 64,
    "pooled_width": 32,
}
"""As narrow as ComfyUI's position embedding allows."""

CLIP_L = {"width": 64, "layers": 3}
CLIP_G = {"width": 64, "layers": 32}
T5 = {"width": 128, "layers": 2}
BERT = {"width": 64, "layers": 3}
MT5 = {"width": 64, "layers": 2, "vocabulary": 400}

OWN_RANKS = (sys.executable, "-m", "tests.comfy.inside.rank")
XFUSER_RANKS = (os.environ.get("XDITD_PYTHON", sys.executable), "-m", "xditd.rank")
MODEL = ModelRef(kind="diffusion_models", name="flux.safetensors")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


Serve = Callable[..., Service]


@functools.cache
def pieces() -> bytes:
    """A tokenizer of sentencepiece, of few pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a red circle left of a blue square", "蓝色方块左边的红色圆圈", "one two three ten"] * 9
        ),
        model_writer=model,
        vocab_size=MT5["vocabulary"],
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_flux(folder / "diffusion_models" / "flux.safetensors", **FLUX, dtype=torch.float32)
    make_vae(folder / "vae" / "ae.safetensors", dtype=torch.float32)
    make_clip(folder / "text_encoders" / "clip_l.safetensors", **CLIP_L, dtype=torch.float32, seed=4)
    make_clip(folder / "text_encoders" / "clip_g.safetensors", **CLIP_G, dtype=torch.float32, seed=5)
    make_t5(folder / "text_encoders" / "t5xxl.safetensors", **T5, dtype=torch.float32, seed=6)
    make_bert(folder / "text_encoders" / "hydit_clip.safetensors", **BERT, dtype=torch.float32, seed=7)
    mt5 = make_t5(folder / "text_encoders" / "mt5xl.safetensors", **MT5, dtype=torch.float32, seed=8)
    tokenizer = torch.frombuffer(bytearray(pieces()), dtype=torch.uint8)
    save_file({**load_file(mt5), "spiece_model": tokenizer}, mt5)  # as CLIPSave writes it
    return folder


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Serve]:
    services: list[Service] = []

    def start(folder: Path | None = None, **settings: Any) -> Service:
        base = {
            "debug.rank_command": OWN_RANKS,
            "devices.kind": "cpu",
            "devices.cpu_ranks": 1,
            "devices.threads": 1,
            "models.folders": {path.name: [str(path)] for path in models.iterdir()},
        }
        service = Service(folder or tmp_path_factory.mktemp("s"), {**base, **settings})
        services.append(service)
        return service

    yield start
    for service in services:
        if service.process.poll() is None:
            service.kill()


@pytest.fixture(scope="session")
def service(serve: Serve) -> Service:
    """A daemon whose ranks compute with ComfyUI's own module."""
    return serve()


@pytest.fixture(scope="session")
def xfuser(serve: Serve) -> Service:
    """A daemon with two of xditd's own ranks."""
    return serve(**{"debug.rank_command": XFUSER_RANKS, "devices.cpu_ranks": 2})


def load(service: Service, plan: PlanRequest | None = None) -> Any:
    """A MODEL as the loader makes it."""
    spec = Dispatcher(service.endpoint, MODEL, plan or PlanRequest())
    return make_model(spec, daemon.client(spec.endpoint).load(spec.model, spec.plan))


@pytest.fixture
def remote(service: Service) -> Any:
    return load(service)


@pytest.fixture(scope="session")
def local(models: Path) -> Any:
    """The same model as ComfyUI has it itself."""
    return own.model(models / "diffusion_models" / "flux.safetensors")
