"""Faults on demand, for tests: how a rank dies, hangs, fails or dawdles when `RankSpec.options` says so.

Without options it does nothing. The options, all strings:
- `crash_at_load`, `hang_at_load`, `fail_at_load`; `crash_at_wake`, `hang_at_wake`, `fail_at_wake`: any value.
- `crash_at_order`, `hang_at_order`, `exit_at_order`, `fail_at_order`, `oom_at_order`: at which turn of this process,
  counted from 1.
- `oom_when_whole`: a VAE lacks memory for every picture that it computes whole.
- `zero_output`: any value; what this rank predicts is zeros. Nothing notices but who looks at the picture.
- `only_rank`: the one rank that has the fault; all have it without.
- `spares`: ranks under a plan with this offload ("model", "layerwise") have no faults.
- `turn_seconds`: how much longer every turn takes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module


class Faults:
    """The faults of one rank."""

    def __init__(self, options: Mapping[str, str], rank: int, offload: str = "") -> None:
        mine = "only_rank" not in options or int(options["only_rank"]) == rank
        mine = mine and not (offload and options.get("spares") == offload)
        self._options = options if mine else {}
        self._delay = float(options.get("turn_seconds", 0))
        self._turns = 0

    def at_load(self) -> None:
        """Called before the model is loaded."""
        self._strike("at_load", lambda value: True)

    def at_wake(self) -> None:
        """Called before the model is woken."""
        self._strike("at_wake", lambda value: True)

    def at_turn(self) -> None:
        """Called before a turn."""
        self._turns += 1
        if self._delay:
            time.sleep(self._delay)
        self._strike("at_order", lambda value: int(value) == self._turns)

    def when_whole(self) -> None:
        """Called before a picture is computed whole."""
        self._strike("when_whole", lambda value: True)

    def at_output(self, backbone: Module) -> None:
        """Called with a network that is loaded, before it is used."""
        if "zero_output" in self._options:
            *_, last = backbone.children()
            last.register_forward_hook(lambda module, given, output: output * 0)

    def _strike(self, when: str, due: Callable[[str], bool]) -> None:
        if not self._options:
            return
        for name, fault in FAULTS.items():
            value = self._options.get(f"{name}_{when}")
            if value is not None and due(value):
                fault()


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        signal.pause()


def _exit() -> None:
    os._exit(0)


def _fail() -> None:
    raise RuntimeError("A fault that a test asked for.")


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("A lack of memory that a test asked for.")


FAULTS: dict[str, Callable[[], None]] = {
    "crash": _crash,
    "hang": _hang,
    "exit": _exit,
    "fail": _fail,
    "oom": _out_of_memory,
}
