"""A model's layers that can be on a device one by one, counted by its facts alone. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from xditd.catalog.families import family
from xditd.protocol.messages import ModelInfo


class Layers(NamedTuple):
    """Of a model, numbers of parameters.

    Attributes:
        sizes: of its layers, in their order; (): it has none that come and go.
        rest: of what is in no layer.
    """

    sizes: tuple[int, ...]
    rest: int

    @property
    def largest(self) -> int:
        """0 where there is none."""
        return max(self.sizes, default=0)

    def of_stage(self, stages: int) -> float:
        """What part of all the stage has that has most of them, with all that is in no layer: 1 where there is no layer."""
        if not self.sizes:
            return 1.0
        most = max(sum(self.sizes[held.start : held.stop]) for held in dealt_out(len(self.sizes), stages))
        return (self.rest + most) / (self.rest + sum(self.sizes))


def dealt_out(total: int, stages: int) -> list[range]:
    """Layers dealt out to stages in their order, as evenly in number as can be; the first stages have those that remain."""
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + total // stages + (stage < total % stages))
    return [range(begin, end) for begin, end in pairwise(ends)]


def layers(info: ModelInfo) -> Layers:
    """Those of a model that a catalog has found."""
    return _count(info.family, tuple(sorted(info.facts.items())))


@lru_cache(maxsize=256)
def _count(name: str, facts: tuple[tuple[str, int], ...]) -> Layers:
    found = family(name)
    if not found.layers:
        return Layers((), 0)
    of: Counter[str] = Counter()
    rest = 0
    for key, shape in found.parameters(dict(facts)).items():
        layer = re.match(found.layers, key)
        if layer is None:
            rest += math.prod(shape)
        else:
            of[layer[0]] += math.prod(shape)
    return Layers(tuple(of.values()), rest)
