"""Plain diffusers in one process, called as its own pipeline calls it: what ranks are measured against."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from xditd.catalog.layouts.flux import pieces
from xditd.models.filling import fill
from xditd.models.flux.config import config
from xditd.models.reading import WeightFile

CPU = torch.device("cpu")

Output = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Reference:
    """diffusers' Flux with a file's weights. Packing and ids are written here anew."""

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, int]) -> None:
        with torch.device("meta"):
            self.module = FluxTransformer2DModel(**config(facts))
        fill(self.module, pieces(facts), WeightFile(path), CPU, torch.float32)

    @torch.no_grad()
    def predict(
        self, x: torch.Tensor, t: float, context: torch.Tensor, pooled: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        batch, _, height, width = x.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
        tokens = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # (channel, row, column), row by row
        ids = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
        out = self.module(
            hidden_states=tokens,
            encoder_hidden_states=context.expand(batch, -1, -1),
            pooled_projections=pooled.expand(batch, -1),
            timestep=torch.full((batch,), t),
            guidance=torch.full((batch,), guidance),
            img_ids=ids,
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
        )[0]
        image = F.fold(out.transpose(1, 2), (rows * 2, columns * 2), kernel_size=2, stride=2)
        return image[:, :, :height, :width]


def euler(
    velocity: Callable[[torch.Tensor, float], torch.Tensor], sigmas: list[float], noise: torch.Tensor
) -> torch.Tensor:
    """Euler's method on a rectified flow, from pure noise."""
    return descend(velocity, sigmas, noise * sigmas[0])


def descend(
    slope: Callable[[torch.Tensor, float], torch.Tensor], sigmas: Sequence[float], x: torch.Tensor
) -> torch.Tensor:
    """The shortest form of Euler's method, from an x at the first sigma: x + dx/dσ·dσ."""
    for sigma, onward in pairwise(sigmas):
        x = x + slope(x, sigma) * (onward - sigma)
    return x


def slope(
    predicts: str, table: Sequence[float], predict: Output, x: torch.Tensor, sigma: float
) -> torch.Tensor:
    """dx/dσ, written anew: a flow's velocity is it; with x = x0 + σ·eps, eps is it, and v tells x0 (Salimans and Ho 2022).

    Args:
        predicts: "flow", "eps" or "v".
        table: the sigma of every timestep that the model was trained at; not looked at for a flow.
        predict: the network's output for x and t [1], as it takes them.
    """
    if predicts == "flow":
        return predict(x, torch.tensor([1000 * sigma]))
    root = (1 + sigma**2) ** 0.5
    t = (torch.tensor(table).log() - math.log(sigma)).abs().argmin().float()[None]
    output = predict(x / root, t)
    if predicts == "eps":
        return output
    x0 = x / root**2 - output * sigma / root
    return (x - x0) / sigma


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, against the standard deviation of what was expected."""
    return float((value.float() - expected).abs().max() / expected.std())
