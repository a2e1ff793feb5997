"""Medians with their quartiles, of times and of ratios taken pair by pair. Knows no clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of a sample and how far its inner half reaches."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    def text(self, digits: int = 3, factor: float = 1.0) -> str:
        """`median (low–high)`, each to so many significant digits, after multiplying by `factor`."""
        median, low, high = (significant(v * factor, digits) for v in (self.median, self.low, self.high))
        return f"{median} ({low}–{high})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratios(values: Sequence[float], references: Sequence[float]) -> Spread:
    """The spread of `value / reference`, where both were measured in the same round.

    Raises:
        ValueError: the two are not of the same rounds.
    """
    return spread([value / reference for value, reference in zip(values, references, strict=True)])


def significant(value: float, digits: int) -> str:
    """A number to so many significant digits, never in exponent notation."""
    if value == 0:
        return "0"
    before_point = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if before_point:
        return f"{value:.{max(digits - before_point, 0)}f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.6f}"
