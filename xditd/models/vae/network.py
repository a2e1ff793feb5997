"""AutoencoderKL on a device: ComfyUI's LATENT and IMAGE in and out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from xditd.catalog.layouts.autoencoder_kl import pieces
from xditd.models.vae.config import config
from xditd.models.weights import Weights


class Autoencoder:
    """An AutoencoderKL. Latents are unscaled, as ComfyUI's LATENT; images are in 0..1, channels last."""

    weights: Weights
    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> AutoencoderKL:
        """The module, as the facts have it."""
        return AutoencoderKL(**config(facts))

    def __init__(
        self, backbone: AutoencoderKL, facts: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype

    def decode(self, latent: torch.Tensor, clamp: bool = True) -> torch.Tensor:
        """A latent [B, C, h, w] as an image [B, H, W, 3], float32; without `clamp` also beyond 0..1."""
        image = self.backbone.decode(latent.to(self.dtype), return_dict=False)[0]
        image = image.float().add_(1).div_(2).permute(0, 2, 3, 1)
        return image.clamp_(0, 1) if clamp else image

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """An image [B, H, W, 3] as a latent [B, C, h, w], float32: the mode of its distribution."""
        image = image.permute(0, 3, 1, 2).to(self.dtype).mul(2).sub_(1)
        latent: torch.Tensor = self.backbone.encode(image, return_dict=False)[0].mode()
        return latent.float()
