"""Latents as patches, and what embeds them: for transformers that take a latent and know themselves where its patches are.

Patches are [B, n, C, p, p], row by row. A module of diffusers takes them as a *column*, a latent that is one patch wide
and n high, [B, C, n·p, p], whichever image and whichever share of one they are; where each stands it is told (`Embed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def grid(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows and columns of patches of a latent of that height and width, which are rounded up."""
    return -(-height // size), -(-width // size)


def split(x: torch.Tensor, size: int) -> torch.Tensor:
    """A latent [B, C, H, W] as patches.

    What a size does not divide is padded with rows and columns from the opposite side, as ComfyUI does.
    """
    batch, channels, height, width = x.shape
    rows, columns = grid(height, width, size)
    if rows * size != height or columns * size != width:
        x = F.pad(x, (0, columns * size - width, 0, rows * size - height), mode="circular")
    x = x.view(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, channels, size, size)


def join(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Patches as a latent [B, C, height, width]; what it was padded with is cut off."""
    batch, _, channels, size, _ = patches.shape
    rows, columns = grid(height, width, size)
    x = patches.view(batch, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, channels, rows * size, columns * size)[:, :, :height, :width]


class Embed(nn.Module):
    """Stands in the place of diffusers' PatchEmbed: embeds a column of patches, each in the place that `places` says.

    Attributes:
        places: embeddings of positions, [1, n, width]; None adds none.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.size: int = stock.patch_size
        # Not the convolution itself: xfuser would wrap it.
        self.weight, self.bias = stock.proj.weight, stock.proj.bias
        self.places: torch.Tensor | None = None

    def forward(self, column: torch.Tensor) -> torch.Tensor:
        tokens = F.conv2d(column, self.weight, self.bias, stride=self.size).flatten(2).transpose(1, 2)
        return tokens if self.places is None else tokens + self.places


def column(patches: torch.Tensor) -> torch.Tensor:
    """Patches as a column, [B, C, n·p, p]."""
    batch, count, channels, size, _ = patches.shape
    return patches.transpose(1, 2).reshape(batch, channels, count * size, size)


def embed(embedding: Embed, patches: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """Patches that stand in these places as hidden states [B, n, width]; None adds no places."""
    embedding.places = places
    tokens: torch.Tensor = embedding(column(patches))
    return tokens


def predicted(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """What a module's last layer gives for each token, [B, n, size·size·C], as patches."""
    return tokens.unflatten(-1, (size, size, -1)).permute(0, 1, 4, 2, 3)


def run(module: Callable[..., Any], patches: torch.Tensor, **same: Any) -> torch.Tensor:
    """One call of a module whose patch embedding is an `Embed`, on patches: the patches that it predicts.

    Args:
        module: diffusers', or xfuser's wrapper around it.
        same: its other keywords.
    """
    batch, count, _, size, _ = patches.shape
    output = module(hidden_states=column(patches), **same, return_dict=False)[0]
    if isinstance(output, tuple):  # xfuser's (prediction, None)
        output = output[0]
    return output.reshape(batch, -1, count, size, size).transpose(1, 2)
