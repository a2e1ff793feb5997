"""AutoencoderKL on a device: ComfyUI's LATENT and IMAGE in and out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from xditd.catalog.layouts.autoencoder_kl import pieces
from xditd.models.vae.config import config
from xditd.models.weights import Weights

OVERLAP = 0.25
"""How much of a tile's side the next one has, too: diffusers' own share, over which the two are blended."""


class Autoencoder:
    """An AutoencoderKL. Latents are unscaled, as ComfyUI's LATENT; images are in 0..1, channels last.

    Tiles are diffusers' own (`enable_tiling`): each is computed on its own, and blended into those beside it. They need the
    memory of one tile, and the result is approximate: normalisation and attention see a tile, not the picture.
    """

    weights: Weights  # that `models.families.load` gives it

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
        self.scale = facts["scale"]

    def decode(self, latent: torch.Tensor, clamp: bool = True, tile: int = 0) -> torch.Tensor:
        """A latent [B, C, h, w] as an image [B, H, W, 3], float32; without `clamp` also beyond 0..1.

        Args:
            tile: the side of a tile in image pixels, a multiple of 4 · `scale`; 0: the picture whole.
        """
        self._tile(tile)
        image = self.backbone.decode(latent.to(self.dtype), return_dict=False)[0]
        image = image.float().add_(1).div_(2).permute(0, 2, 3, 1)
        return image.clamp_(0, 1) if clamp else image

    def encode(self, image: torch.Tensor, tile: int = 0) -> torch.Tensor:
        """An image [B, H, W, 3] as a latent [B, C, h, w], float32: the mode of its distribution. For `tile` see `decode`."""
        self._tile(tile)
        image = image.permute(0, 3, 1, 2).to(self.dtype).mul(2).sub_(1)
        latent: torch.Tensor = self.backbone.encode(image, return_dict=False)[0].mode()
        return latent.float()

    def _tile(self, tile: int) -> None:
        backbone = self.backbone
        backbone.use_tiling = tile > 0
        backbone.tile_sample_min_size, backbone.tile_latent_min_size = tile, tile // self.scale
        backbone.tile_overlap_factor = OVERLAP
