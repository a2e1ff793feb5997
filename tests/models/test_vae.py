"""The VAE's key map against diffusers' own converter, in Flux's layout and in SD's."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from xditd.models.families import load
from xditd.models.making import make_vae, vae_facts
from xditd.models.reading import WeightFile
from xditd.models.vae.config import config

LAYOUTS = {
    "flux": {"latent_channels": 16, "quant": False},
    "sd": {"latent_channels": 4, "quant": True, "multiples": (1, 2, 4)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_it_loads_what_diffusers_converter_gives(tmp_path, layout: str, prefix: str) -> None:
    path = make_vae(tmp_path / "vae.safetensors", **LAYOUTS[layout], prefix=prefix)
    file = WeightFile(path)
    plain = AutoencoderKL(**config(vae_facts(**LAYOUTS[layout])))
    converted = convert_ldm_vae_checkpoint(
        {key: file.tensor(key) for key in file.header.tensors}, dict(plain.config)
    )
    plain.load_state_dict(converted)
    ours = load("autoencoder_kl", path, "vae", torch.device("cpu"), torch.float32).backbone
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
