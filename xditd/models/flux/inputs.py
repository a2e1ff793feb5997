"""Flux: latents to tokens and back, and where the tokens stand. Pure functions on tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xditd.catalog.families.flux import PATCH


def grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a latent of that height and width, which odd sizes are rounded up to."""
    return -(-height // PATCH), -(-width // PATCH)


def pack(x: torch.Tensor) -> torch.Tensor:
    """A latent [B, C, H, W] as tokens [B, rows·columns, C·4], each a 2×2 square in the order (channel, row, column).

    An odd size is padded with the row or column from the opposite side, as ComfyUI does.
    """
    batch, channels, height, width = x.shape
    rows, columns = grid(height, width)
    if rows * PATCH != height or columns * PATCH != width:
        x = F.pad(x, (0, columns * PATCH - width, 0, rows * PATCH - height), mode="circular")
    x = x.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, channels * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens as a latent [B, C, height, width]; what an odd size was padded with is cut off."""
    rows, columns = grid(height, width)
    batch, _, depth = tokens.shape
    channels = depth // PATCH**2
    x = tokens.view(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, channels, rows * PATCH, columns * PATCH)[:, :, :height, :width]


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Of each token of a latent: (0, row, column), float32 [rows·columns, 3]."""
    rows, columns = grid(height, width)
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.view(rows * columns, 3)


def text_ids(length: int, device: torch.device) -> torch.Tensor:
    """Of each token of a text: zeros, float32 [length, 3]."""
    return torch.zeros(length, 3, device=device)
