"""A result that was had otherwise than asked: an event for whoever listens, a warning for whoever does not. stdlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Degraded:
    """What `on_event` hears of a request that was done with less than it asked for.

    Attributes:
        model: its name.
        reason: why, and what was done instead: fewer devices, offload, or tiles, which are approximate.
    """

    model: str
    reason: str


class DegradedWarning(UserWarning):
    """The same for a program that listens to no events."""


def tell(model: str, reason: str, on_event: Callable[[Any], None] | None, depth: int) -> None:
    """Says so, where there is a reason.

    Args:
        depth: how many calls above this one the program's own is, which the warning names.
    """
    if not reason:
        return
    if on_event is None:
        warnings.warn(f"{model} was degraded: {reason}", DegradedWarning, stacklevel=depth + 1)
    else:
        on_event(Degraded(model, reason))
