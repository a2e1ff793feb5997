"""A running pipeline of stages, asked for samplings step by step, as the daemon asks."""

from __future__ import annotations

from typing import Any

import torch

from tests.rank.ranks import Ranks, framed, tensor_of
from xditd.protocol import orders

FLOW = (1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.0)
DIFFUSION = (14.6, 7.0, 3.5, 1.6, 0.7, 0.2, 0.0)
"""Sigmas of six steps, of either kind of noise."""


class Pipeline:
    """Ranks that are stages. Every sampling's conditioning is "c", as it was put last."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._orders = 0

    def begin(self, run: int, noise: torch.Tensor, sigmas: Any = FLOW, **asked: Any) -> None:
        (described,), frames = framed([noise])
        self.ranks.send(
            orders.BeginSample(
                run=run, sigmas=tuple(sigmas), noise=described, latent=None, conditioning="c", out=None, previews=(),
                **{"sampler": "euler", "negative": None, "cfg": 1.0, "preview_frames": False} | asked,
            ),
            *frames,
        )  # fmt: skip

    def step(self, run: int, step: int) -> tuple[orders.TurnDone, list[torch.Tensor], list[bytes]]:
        self._orders += 1
        order = orders.TurnSample(order=self._orders, run=run, step=step)
        self.ranks.send(order)
        done, frames = self.ranks.wait(orders.TurnDone)
        assert done.order == order.order
        return done, [tensor_of(t, frames) for t in done.outputs], frames

    def sample(self, run: int, noise: torch.Tensor, sigmas: Any = FLOW, **asked: Any) -> torch.Tensor:
        self.begin(run, noise, sigmas, **asked)
        for step in range(len(sigmas) - 1):
            done, outputs, _ = self.step(run, step)
            assert len(done.outputs) == (step == len(sigmas) - 2)
        return outputs[0]
