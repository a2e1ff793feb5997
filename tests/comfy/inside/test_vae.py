"""The VAE: stock nodes over the daemon's give ComfyUI's own images and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.model_patcher
import comfy.sd
import comfy.utils
import nodes
import pytest
import torch

from comfy_nodes import daemon
from comfy_nodes.dispatcher import Dispatcher
from comfy_nodes.vae import RemoteVAE, missing_vae
from tests.live.service import Service
from xditd.protocol.errors import XditError
from xditd.protocol.messages import ModelRef, PlanRequest

BOUND = 3e-5  # of an image's own spread, a quarter of the whole range


@pytest.fixture(scope="module")
def remote(xfuser: Service) -> Any:
    spec = Dispatcher(xfuser.endpoint, ModelRef(kind="vae", name="ae.safetensors"), PlanRequest())
    return RemoteVAE(spec, daemon.client(spec.endpoint).load(spec.model, spec.plan).model)


@pytest.fixture(scope="module")
def local(models: Path) -> Any:
    """ComfyUI's own VAE. Its loader takes only the width of the real one: so its classes, with the file's width."""
    weights = comfy.utils.load_torch_file(str(models / "vae" / "ae.safetensors"))
    width = weights["encoder.conv_in.weight"].shape[0]
    layout = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": width,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    kinds = "comfy.ldm.modules.diffusionmodules.model"
    engine = comfy.ldm.models.autoencoder.AutoencodingEngine(
        regularizer_config={
            "target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer",
            "params": {"sample": False},
        },
        encoder_config={"target": f"{kinds}.Encoder", "params": layout},
        decoder_config={"target": f"{kinds}.Decoder", "params": layout},
    )
    engine.load_state_dict(weights, strict=True)
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = engine.eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(engine, torch.device("cpu"), torch.device("cpu"))
    vae.latent_channels, vae.upscale_ratio, vae.downscale_ratio, vae.vae_dtype = 16, 8, 8, torch.float32
    vae.process_input, vae.process_output = (
        (lambda x: x * 2.0 - 1.0),
        (lambda x: x.add_(1.0).div_(2.0).clamp_(0.0, 1.0)),
    )
    return vae


def latent(height: int, width: int, batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))}


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(2))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = float((ours - theirs).abs().max()) / float(theirs.std())
    print(f"max difference over std: {error:.1e}")
    return error


@pytest.mark.parametrize(("height", "width", "batch"), [(8, 8, 1), (9, 6, 2)])
def test_decode(remote: Any, local: Any, height: int, width: int, batch: int) -> None:
    decode = nodes.VAEDecode().decode
    given = latent(height, width, batch)
    assert apart(decode(remote, given)[0], decode(local, given)[0]) <= BOUND


def test_decode_in_tiles(remote: Any, local: Any) -> None:
    decode = nodes.VAEDecodeTiled().decode
    ours, theirs = (decode(vae, latent(12, 10), 64, overlap=16)[0] for vae in (remote, local))
    assert (
        apart(ours, theirs) <= 1e-4
    )  # ComfyUI clamps to 0…1 after it blends the tiles, the daemon each tile


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 50)], ids=["fits", "is cropped"])
def test_encode(remote: Any, local: Any, height: int, width: int) -> None:
    encode = nodes.VAEEncode().encode
    ours, theirs = (encode(vae, image(height, width))[0]["samples"] for vae in (remote, local))
    assert apart(ours, theirs) <= BOUND


def test_encode_in_tiles(remote: Any, local: Any) -> None:
    encode = nodes.VAEEncodeTiled().encode
    ours, theirs = (encode(vae, image(96, 80), 64, 16)[0]["samples"] for vae in (remote, local))
    assert apart(ours, theirs) <= BOUND


def test_encode_for_inpainting(remote: Any, local: Any) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:40, 8:32] = 1.0
    ours, theirs = (
        nodes.VAEEncodeForInpaint().encode(vae, image(64, 64), mask)[0] for vae in (remote, local)
    )
    assert apart(ours["samples"], theirs["samples"]) <= BOUND
    assert torch.equal(ours["noise_mask"], theirs["noise_mask"])


def test_weights_that_are_not_there_are_not_saved(remote: Any) -> None:
    with pytest.raises(XditError, match="weights"):
        remote.get_sd()


def test_a_checkpoint_without_a_vae_says_so_when_it_is_used() -> None:
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        nodes.VAEDecode().decode(missing_vae(), latent(8, 8))


def test_nothing_is_left_behind(remote: Any, xfuser: Service) -> None:
    assert not daemon.client(xfuser.endpoint).status().runs
