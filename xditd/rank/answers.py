"""What a rank's worker is to the loop: handlers of orders, and what they answer. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xditd.protocol.tensors import Tensor
from xditd.rank.places import Frames


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a turn. Frames follow for those outputs that have no slot."""

    outputs: tuple[Tensor, ...] = ()
    frames: Sequence[Any] = field(default_factory=list)
    preview: Tensor | None = None
    degraded: str = ""  # why the turn was not done as ordered


Handler = Callable[[Any, Frames], Any]
"""Takes an order and its frames; a turn's returns an Answer, on rank 0 the one that is sent."""


Handlers = Mapping[type[Any], Handler]
"""By the class of the order."""


class Worker(Protocol):
    """What a rank does its orders with: a transformer, a VAE, a text encoder, or nothing (echo)."""

    handlers: Handlers
    attention: str  # what RankReady tells
    weights: int  # what it tells, too: bytes of parameters on the device
    host_weights: int  # and of those that wait in the host's memory

    def device_memory(self) -> int | None:
        """Bytes reserved on the device; None where there is none, or it was told a moment ago."""

    def usable(self) -> bool:
        """After an exception: whether the device still works. Frees what the exception left behind."""
