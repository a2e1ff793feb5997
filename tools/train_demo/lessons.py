"""What a step of the transformer's training learns from: latents of scenes with noise, their captions, and where to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tools.train_demo import dataset, render
from tools.train_demo.networks import SCALE, SHIFT, Networks, shifted
from tools.train_demo.pace import Piece
from xditd.models.flux import inputs

EMPTY = 0.1  # of the captions are taken away, for cfg

TAUGHT_SHIFT = 5.0
"""Of the sigmas that are trained: four in ten lie between 0.8 and 0.97. Measured of a model that was trained on even ones:
its error is 0.49 at 0.999, 0.22 at 0.9, 0.05 at 0.8 and 0.02 at 0.6, so what and where things are is decided above 0.8."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Of B pictures.

    Attributes:
        x: latents with noise, packed [B, 256, 64].
        sigma: of each, [B].
        velocity: noise - latent, packed.
        clip, t5: tokens of their captions, or of none.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    velocity: torch.Tensor
    clip: torch.Tensor
    t5: torch.Tensor


class Lessons:
    """Scenes on the device, with their captions.

    Args:
        target: latents [N, 16, 32, 32].
        clip, t5: tokens.
    """

    def __init__(self, target: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor) -> None:
        self._target, self._clip, self._t5 = target, clip.long(), t5.long()
        self._no_clip, self._no_t5 = (ids.to(target.device).long() for ids in dataset.tokens([""]))

    def draw(self, count: int, filled: int) -> Lesson:
        """Some of them, at some sigmas.

        Args:
            filled: tokens to which T5's are filled.
        """
        device = self._target.device
        chosen = torch.randint(len(self._target), (count,), device=device)
        x0 = self._target[chosen].float()
        silent = torch.rand(count, 1, device=device) < EMPTY
        sigma = shifted(torch.rand(count, device=device), TAUGHT_SHIFT)
        noise = torch.randn_like(x0)
        return Lesson(
            x=inputs.pack(torch.lerp(x0, noise, sigma[:, None, None, None])),
            sigma=sigma,
            velocity=inputs.pack(noise - x0),
            clip=torch.where(silent, self._no_clip, self._clip[chosen]),
            t5=_filled(torch.where(silent, self._no_t5, self._t5[chosen]), filled),
        )

    def nothing(self, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's and T5's tokens of the empty prompt."""
        return self._no_clip, _filled(self._no_t5, filled)


def read(piece: Piece, seed: int, data: Path | None, cache: Path | None) -> Lessons:
    """The lessons of a piece.

    Args:
        seed: of the scenes, where there is no `data`.
        data: scenes that `dataset` wrote.
        cache: a file for what is made of them, to be kept between pieces.
    """
    if cache is not None and cache.exists():
        kept = load_file(cache, str(piece.device))
    else:
        captioned = dataset.make(piece.scenes, seed) if data is None else dataset.read(data)
        piece.log(scenes=len(captioned.numbers))
        kept = {
            "latents": latents(piece.net, captioned.numbers, piece.device),
            "clip": captioned.clip.to(piece.device),
            "t5": captioned.t5.to(piece.device),
        }
        if cache is not None:
            save_file(kept, cache)
    target = kept["latents"]
    piece.log(
        latents=list(target.shape),
        mean=round(target.float().mean().item(), 3),
        std=round(target.float().std().item(), 3),
    )
    return Lessons(target, kept["clip"], kept["t5"])


@torch.no_grad()
def latents(net: Networks, numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the transformer learns to draw: [N, 16, 32, 32], scaled, bfloat16, on the device."""
    vae = copy.deepcopy(net.vae).to(torch.bfloat16)
    made = []
    for part in numbers.split(64):
        picture = (render.render(part.to(device)) * 2 - 1).to(torch.bfloat16)
        mean = vae.encode(picture.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
        made.append(((mean - SHIFT) * SCALE).to(torch.bfloat16))
    return torch.cat(made).contiguous()  # the network's are channels last, and files hold no such


def _filled(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(tokens, (0, length - tokens.shape[1]))
