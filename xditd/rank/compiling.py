"""Layers of a network that are compiled, and why the answer of a call that compiled is not given. Knows no family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
from torch import nn

ATTEMPTS = 4
"""Calls of one answer, at most."""

VARIANTS = 64
"""Pieces of code for one kind of layer, at most; torch has 8. SD3.5 medium's layers are of four makes, each twice for a size and a batch."""


def compile_layers(
    network: Any, layers: Iterable[nn.Module], *, alone: bool, backend: str = "inductor"
) -> None:
    """Has layers of a transformer compiled when they first run, and again where a call is like none before.

    Args:
        alone: this rank computes a call by itself. Else ranks meet within a layer, which is no code to be compiled: what is
            before, between and after is.
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = VARIANTS  # past it a call fails; where ranks meet, it runs eagerly
    # Each by itself, so that 57 of two kinds cost two; dynamic, so that a new size costs a fifth of a second.
    for layer in layers:
        layer.compile(fullgraph=alone, dynamic=True, backend=backend)
    network.call = Settled(network.call, alone)


class Settled:
    """Calls something again as long as that compiles.

    In such a call the first layer runs code that was made for it, and the others what was made for the second: that is the wider, and
    from then on the first runs it too. In bfloat16 the two differ in a last place, so the same step would give other bits later.

    Ranks that meet within a call have to agree on how often it is made: they make the first one twice, and no other.
    """

    def __init__(self, call: Callable[..., torch.Tensor], alone: bool) -> None:
        self._call = call
        self._alone = alone
        self._called = False

    def __call__(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        for _ in range(ATTEMPTS):
            before, first, self._called = compiled(), not self._called, True
            answer = self._call(*arguments, **keywords)
            again = compiled() != before if self._alone else first
            if not again:
                break
        return answer


def compiled() -> int:
    """How many pieces of code this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
