"""Muon (kellerjordan.github.io/posts/muon): momentum made orthogonal; matrices of one shape at once.

torch.optim.Muon goes through them one by one, with fifteen small products each: for a network as small as this, longer
than the step itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton and Schulz's iteration of fifth order, by Keller Jordan: fast towards singular values between 0.7 and 1.2."""


class Muon(torch.optim.Optimizer):
    """For matrices. Its rate, in a tensor, is AdamW's: an update has that one's usual size, 0.2 (arXiv:2502.16982)."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: torch.Tensor, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for group in self.param_groups:
            for matrix in group["params"]:
                alike[matrix.shape].append(matrix)
        self._alike = list(alike.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        (group,) = self.param_groups
        for matrices in self._alike:
            gradients: list[Any] = [matrix.grad for matrix in matrices]
            if any(gradient is None for gradient in gradients):
                continue
            first = self.state[matrices[0]]
            gradient = torch.stack(gradients)
            if "momentum" not in first:
                first["momentum"] = torch.zeros_like(gradient)
            momentum = first["momentum"]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(torch.lerp(gradient, momentum, MOMENTUM))  # Nesterov's
            size = 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list((update * (-group["lr"] * size)).to(gradient.dtype)))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each of matrices [n, rows, columns], in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
