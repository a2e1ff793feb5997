"""The four networks in the demo's sizes, to be trained; and as ComfyUI's files, to be shipped.

The classes are those that the ranks run (`xditd.models`); only their parameters are made here instead of read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from xditd.catalog.families import autoencoder_kl, clip, flux, t5
from xditd.catalog.layouts.piece import Piece
from xditd.models import making
from xditd.models.families import FAMILIES, Network
from xditd.models.reading import WeightFile
from xditd.models.t5.config import config as t5_config

FLUX = making.flux_facts(
    heads=4, head_dim=64, double_blocks=1, single_blocks=4, context_width=64, pooled_width=16, guidance=True
)
VAE = making.vae_facts(width=64, multiples=(1, 1, 1, 1), blocks=1)
CLIP = making.clip_facts(width=16, layers=2, projection=False)
T5 = making.t5_facts(width=64, layers=2, heads=2, head_dim=32)

GUIDANCE = 3.5
"""What ComfyUI says to a model with a guidance input. This one is trained to draw the same at any; that it has the
input makes it a dev, whose sigmas are shifted upward: there, pictures as plain as these get their layout."""

SIGMA_SHIFT = 3.158
"""exp(1.15), ComfyUI's for a dev."""

SCALE, SHIFT = 0.3611, 0.1159
"""Flux's latents have (latent - SHIFT) · SCALE of about unit variance; a VAE of ours must give such."""

TEXT_DTYPE = torch.float8_e4m3fn

FILES = {
    "flux": ("diffusion_models/xditd-demo.safetensors", torch.bfloat16),
    "vae": ("vae/xditd-demo-vae.safetensors", torch.float16),
    "clip": ("text_encoders/xditd-demo-clip_l.safetensors", TEXT_DTYPE),
    "t5": ("text_encoders/xditd-demo-t5xxl.safetensors", TEXT_DTYPE),
}
"""Where each is shipped, and as what. Tables of 49,408 and 32,128 tokens are the text encoders' bulk."""


def shifted(even: torch.Tensor, shift: float) -> torch.Tensor:
    """Sigmas of even ones, moved to the noisy end: `xditd.cli.schedule` has the source."""
    return shift * even / (1 + (shift - 1) * even)


class Networks(nn.Module):
    """The four together.

    Attributes:
        flux, vae: diffusers' modules.
        clip, t5: transformers' text encoders.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = FAMILIES["autoencoder_kl"].kind.empty(VAE)
        self.flux: Any = FAMILIES["flux"].kind.empty(FLUX)
        self.clip: Any = FAMILIES["clip"].kind.empty(CLIP)
        self.t5 = T5EncoderModel(T5Config(**t5_config(T5), attn_implementation="eager"))
        # What modulates begins at nothing: a block is at first what it adds to (adaLN-Zero, arXiv:2212.09748).
        for name, layer in self.flux.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.flux.proj_out.weight)
        # Widths are small: rows of the usual 0.02 would be lost in fp8.
        embeddings = self.clip.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.25)

    def part(self, name: str) -> tuple[nn.Module, Mapping[str, Piece]]:
        """One network, and for each of its parameters the tensor of the file that it is part of."""
        modules = {"flux": self.flux, "vae": self.vae, "clip": self.clip, "t5": self.t5.encoder}
        kind, facts = KINDS[name]
        return modules[name], kind.pieces(facts, "")

    def read_text(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context [B, n, 64] and pooled [B, 16] of tokens, as ComfyUI's Flux has them."""
        context = self.t5(input_ids=t5_ids).last_hidden_state
        ends = (clip_ids == clip.END).int().argmax(-1)
        hidden = self.clip.text_model(input_ids=clip_ids).last_hidden_state
        return context, hidden[torch.arange(len(hidden), device=hidden.device), ends]


KINDS: Mapping[str, tuple[type[Network], Mapping[str, int]]] = {
    "flux": (FAMILIES["flux"].kind, FLUX),
    "vae": (FAMILIES["autoencoder_kl"].kind, VAE),
    "clip": (FAMILIES["clip"].kind, CLIP),
    "t5": (FAMILIES["t5"].kind, T5),
}
"""The classes that run them, and their sizes."""

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "flux": flux.parameters(FLUX),
    "vae": autoencoder_kl.parameters(VAE),
    "clip": clip.parameters(CLIP),
    "t5": t5.parameters(T5),
}
"""Of every tensor of every file."""


def write(networks: Networks, folder: Path, names: tuple[str, ...] = tuple(FILES)) -> None:
    """Writes the networks as ComfyUI's files, each in the dtype in which it is shipped."""
    for name in names:
        network, pieces = networks.part(name)
        state = network.state_dict()
        file = {key: torch.zeros(shape) for key, shape in SHAPES[name].items()}
        for parameter, piece in pieces.items():
            value = state[parameter].detach().float().cpu()
            if piece.swapped:
                value = torch.cat(value.chunk(2)[::-1])
            target = file[piece.key]
            if piece.rows is not None:
                target = target[piece.rows[0] : piece.rows[1]]
            target.copy_(value.view(target.shape))
        relative, dtype = FILES[name]
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.to(dtype) for key, value in file.items()}, path)


def read(networks: Networks, folder: Path, names: tuple[str, ...] = tuple(FILES)) -> None:
    """Gives the networks the weights of files that `write` wrote; for training that goes on from there."""
    for name in names:
        path = folder / FILES[name][0]
        file = WeightFile(path)
        network, pieces = networks.part(name)
        for parameter, target in network.state_dict().items():
            piece = pieces.get(parameter)
            if piece is None:  # a buffer
                continue
            target.copy_(file.value(piece, torch.float32).view(target.shape))
