"""How a piece of training goes: what it is given, its pace, its learning rate, its average, its log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tools.train_demo.networks import TEXT_DTYPE, Networks

WARM = 200  # steps in which the learning rate rises
TIMED = 60  # steps before the clock begins, and between two looks at it
KEPT = 100.0  # seconds between two times that what is trained is written
EMA = 0.9995


class Log:
    """Lines for a person and for the card: printed, and kept as JSON."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._began = time.monotonic()

    def __call__(self, **fields: object) -> None:
        fields = {"seconds": round(time.monotonic() - self._began, 1), **fields}
        print(" ".join(f"{name}={value}" for name, value in fields.items()), flush=True)
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a piece of training is given.

    Attributes:
        batch: pictures of a step.
        scenes: that it learns from.
        steps: how many; None is as many as the minutes have.
        minutes: of training; until: seconds since 1970 at which it ends in any case.
        hold: the part of it at the full learning rate, before that falls.
        state: a file with all that is trained, optimisers and averages too: read where it exists, written at the end.
        record: steps as CUDA graphs.
        write: writes the networks as they are.
    """

    net: Networks
    device: torch.device
    batch: int
    scenes: int
    steps: int | None
    minutes: float
    until: float
    hold: float
    state: Path | None
    record: bool
    log: Log
    write: Callable[[], None]


class Snapshots:
    """Writes averages now and then while a piece is trained: a machine that is lent may be taken back.

    Args:
        write: writes the networks as they are.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._last = time.monotonic()

    def keep(self, average: Average) -> None:
        """Writes it, where the last time is long ago."""
        if time.monotonic() - self._last > KEPT:
            average.swap()
            self._write()
            average.swap()
            self._last = time.monotonic()


class Average:
    """An exponential moving average of parameters: what is shipped.

    Attributes:
        live: the parameters; kept: their averages; steps: over which they were taken.
    """

    def __init__(self, network: nn.Module) -> None:
        self.live = list(network.parameters())
        self.kept = [parameter.detach().clone() for parameter in self.live]
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        decay = min(EMA, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def settle(self, *networks: nn.Module) -> None:
        """Rounds the averages of networks to what their files hold; they are theirs from then on, and stay."""
        theirs = {id(parameter) for network in networks for parameter in network.parameters()}
        for kept, live in zip(self.kept, self.live, strict=True):
            if id(live) in theirs:
                kept.copy_(kept.to(TEXT_DTYPE))
                live.copy_(kept)
                live.requires_grad_(False)

    def swap(self) -> None:
        """Exchanges the average and what is trained."""
        for kept, live in zip(self.kept, self.live, strict=True):
            trained = live.detach().clone()
            live.data.copy_(kept)
            kept.copy_(trained)


def rate(step: int, done: float, peak: float, hold: float) -> float:
    """The learning rate: up in a line for the first steps, held for a part of the piece, down in a line to nothing.

    So that pieces follow one another as one training would: all but the last hold it throughout (arXiv:2405.18392).
    """
    falls = 1.0 if hold >= 1 else min(1.0, (1 - done) / (1 - hold))
    return peak * min(1.0, (step + 1) / WARM) * falls


def paced(piece: Piece) -> Iterator[float]:
    """Counts steps: gives which part of the piece is done, 0 to 1, by its steps or by the clock.

    The clock begins after the first steps, which compile. How many steps it let pass is logged: `steps` repeats them.
    """
    step, began, last = 0, math.inf, 0.0
    minutes = math.inf
    while True:
        if piece.steps is not None:
            done = step / piece.steps
        else:
            if step % TIMED == 0 and torch.cuda.is_available():
                torch.cuda.synchronize()  # or steps are begun long before they are done
            if step == TIMED:
                began = time.monotonic()
                minutes = min(piece.minutes, (piece.until - time.time()) / 60)
            if step % TIMED == 0:
                last = max(0.0, (time.monotonic() - began) / 60 / minutes)
            done = last
        if done >= 1:
            break
        yield done
        step += 1
    passed = time.monotonic() - began
    piece.log(
        steps=step, milliseconds_a_step=round(passed / max(1, step - TIMED) * 1e3, 2) if passed > 0 else None
    )


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
