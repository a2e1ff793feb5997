"""The samplings that are compared: every pair of choices at least once. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEDULERS = ("simple", "normal", "karras", "beta")

CHOICES: dict[str, tuple[Any, ...]] = {
    "scheduler": SCHEDULERS,
    "cfg": (1.0, 4.0),
    "batch": (1, 3),
    "way": ("plain", "denoise 0.5", "partial mask", "advanced in two"),
    "texts": ("equal", "unequal", "area", "timestep range"),
    "size": ((16, 16), (14, 18)),
}


@dataclass(frozen=True)
class Case:
    sampler: str
    scheduler: str
    cfg: float
    batch: int
    way: str
    texts: str
    size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{self.sampler}, {self.scheduler}, cfg {self.cfg:g}, batch {self.batch}, {self.way}, {self.texts} texts, "
            f"{height * 8}×{width * 8}"
        )


def cases(samplers: Sequence[str]) -> list[Case]:
    return [Case(**choice) for choice in pairwise({"sampler": tuple(samplers), **CHOICES})]


def pairwise(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every two choices of two factors meet at least once, taken greedily: few, if not the fewest."""
    names = sorted(choices, key=lambda name: -len(choices[name]))
    first, second, *others = names
    left = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x in choices[a]
        for y in choices[b]
    }
    rows = []
    heads = list(itertools.product(choices[first], choices[second]))
    while left:
        head = heads[len(rows) % len(heads)]
        row = {first: head[0], second: head[1]}
        for name in others:
            row[name] = max(choices[name], key=lambda value: _met(left, row, name, value))
        rows.append(row)
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    return rows


def _met(left: set[frozenset[Any]], row: Mapping[str, Any], name: str, value: Any) -> int:
    return sum(frozenset((item, (name, value))) in left for item in row.items())
