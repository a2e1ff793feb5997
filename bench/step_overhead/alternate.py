"""Turns on one device: each contender has it to itself, and the next begins when it is done."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.step_overhead.contenders import Bare, Contender

Times = dict[str, list[float]]
"""Seconds a step by contender, one for each round: the same index is the same round."""


def alternate(
    contenders: Sequence[Contender],
    bare: Bare,
    fresh: Callable[[], torch.Tensor],
    rounds: int,
    steps: int,
    on_turn: Callable[[], None] = lambda: None,
) -> Times:
    """Runs the rounds; the order within one changes.

    Args:
        fresh: makes a new latent on the CPU; all turns of a round take the same.
        steps: timed in a turn, after one that is not: the device changes hands with it. A turn's time is their median.
        on_turn: called after every turn.
    """
    order = random.Random(0)
    times: Times = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        x = fresh()
        for contender in order.sample(contenders, len(contenders)):
            bare.settle(x)
            contender.step(x)
            times[contender.name].append(statistics.median(_timed(contender, x) for _ in range(steps)))
            on_turn()
    return times


def _timed(contender: Contender, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    contender.step(x)
    return time.perf_counter() - begin


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two predictions, over the standard deviation of the second."""
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    return float((one - other).abs().max() / other.std())
