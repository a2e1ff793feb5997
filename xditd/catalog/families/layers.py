"""A model's layers that can be on a device one by one, counted by its facts alone. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from xditd.catalog.families import family
from xditd.protocol.messages import ModelInfo


class Layers(NamedTuple):
    """Of a model, numbers of parameters.

    Attributes:
        largest: of its largest layer; 0: it has none that come and go.
        rest: of what is in no layer.
    """

    largest: int
    rest: int


def layers(info: ModelInfo) -> Layers:
    """Those of a model that a catalog has found."""
    return _count(info.family, tuple(sorted(info.facts.items())))


@lru_cache(maxsize=256)
def _count(name: str, facts: tuple[tuple[str, int], ...]) -> Layers:
    found = family(name)
    if not found.layers:
        return Layers(0, 0)
    of: Counter[str] = Counter()
    rest = 0
    for key, shape in found.parameters(dict(facts)).items():
        layer = re.match(found.layers, key)
        if layer is None:
            rest += math.prod(shape)
        else:
            of[layer[0]] += math.prod(shape)
    return Layers(max(of.values(), default=0), rest)
