"""The stacks to compare. Each is a real path client → daemon → rank → daemon → client, with one interface."""

from __future__ import annotations

from typing import Protocol

import torch

from bench.handoff.payloads import SENT

EVERY = tuple(payload.name for payload in SENT)
"""The payloads of a peer that keeps nothing between calls."""


class Peer(Protocol):
    """One stack."""

    name: str
    says: str  # one line for the table's legend
    payloads: tuple[str, ...]  # the names of those that it takes

    def start(self) -> None:
        """Starts its processes; returns when the first call can be answered.

        Raises:
            Unavailable: it cannot run on this machine.
        """

    def prepare(self, payload: str) -> None:
        """What comes before a job hands its tensors over. Not timed."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One job there and back. The result may be a view that holds until the next call."""

    def stop(self) -> None:
        """Ends its processes. Safe after a failed start."""


class Unavailable(Exception):
    """A peer cannot run here; the text says why."""
