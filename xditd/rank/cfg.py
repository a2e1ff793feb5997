"""The calls of one turn dealt out among the groups of a world: cond and uncond are computed side by side.

Ranks are numbered group by group: with cfg 2 × ulysses 2 the groups are (0, 1) and (2, 3), each split by its sequence.
Call i is that of group i mod degree; afterwards every rank has every result. A turn with fewer calls than groups leaves
groups idle: exact, and of no use to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed


class Call(NamedTuple):
    """A call of the network, and what its result looks like.

    Attributes:
        compute: the call; with a sequence-parallel group, to be made by all of its ranks.
        shape: of the result.
        dtype: of the result.
    """

    compute: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype


class CfgParallel:
    """This rank's part in the calls of a turn.

    Args:
        degree: how many groups there are; 1 computes every call here.
        rank, world: of this process; torch.distributed is joined where there is more than one group.
        device: where results are received.
    """

    def __init__(self, degree: int, rank: int, world: int, device: torch.device) -> None:
        self._degree = degree
        self._each = world // degree
        self._mine = rank // self._each
        self._device = device

    def run(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        """The result of every call, on every rank. A collective: all ranks give the same calls."""
        if self._degree == 1:
            return [call.compute() for call in calls]
        own = {
            i: call.compute().contiguous() for i, call in enumerate(calls) if i % self._degree == self._mine
        }
        results = []
        for i, call in enumerate(calls):
            result = own[i] if i in own else torch.empty(call.shape, dtype=call.dtype, device=self._device)
            torch.distributed.broadcast(result, src=i % self._degree * self._each)
            results.append(result)
        return results
