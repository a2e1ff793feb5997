"""What the daemon's core may ask of the world. `clients.Clients` and `ranks.Ranks` answer it; tests do too.

And what the fleet tells the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group
from xditd.daemon.runs import Key, Run
from xditd.protocol.errors import Code
from xditd.protocol.plans import ModelRef

HOST = "host"
"""The pool of memory that is the machine's own, whichever devices it has."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, or of the machine where CPU ranks share it: bytes."""

    total: int  # that the daemon may use
    free: int  # of those, by what the device says


class MemoryPort(Protocol):
    """The way to what devices say of their memory."""

    def memory(self, pool: str) -> Memory | None:
        """Of a GPU by its name, of all CPU ranks by "cpu", of the machine by `HOST`; None where it is not counted."""


class ClientPort(Protocol):
    """The way to clients."""

    def answer(self, peer: bytes, reply: Struct, frames: Sequence[Any] = ()) -> None:
        """Sends a reply or an event."""


class RankPort(Protocol):
    """The way to ranks."""

    def start(self, group: Group) -> None:
        """Starts the group's rank processes."""

    def order(
        self, group: Group, order: Struct, *, peer: bytes | None = None, frames: Sequence[Any] = ()
    ) -> None:
        """Sends an order to every rank of a group; `peer` is the client whose segments it names."""

    def kill(self, group: Group) -> None:
        """Kills what is left of the group's rank processes."""


class Listener(Protocol):
    """Who must know what becomes of groups."""

    def wanted(self, group: Group) -> bool:
        """Whether a run counts on such a group: it waits for it, or is bound to it or to another replica."""

    def depends(self, group: Group, others: Set[Key] | None = None) -> bool:
        """Whether a run waits for it that could go to no other, or to none with one of these keys."""

    def uses(self, group: Group) -> bool:
        """Whether a run is bound to it, or waits for such a group."""

    def holds(self, group: Group) -> bool:
        """Whether a run is bound to it."""

    def group_starting(self, group: Group, now: float) -> None:
        """Its slowest rank has come to another phase."""

    def group_ready(self, group: Group, now: float) -> None:
        """It serves from now on."""

    def group_asleep(self, group: Group, now: float) -> None:
        """Its ranks have given their devices' memory back."""

    def group_failed(self, group: Group, now: float) -> None:
        """It was killed; `group.code` and `group.problem` say why."""

    def group_gone(self, group: Group, now: float) -> None:
        """Its last rank has ended."""

    def given_up(self, group: Group, code: Code | str, message: str, now: float) -> None:
        """No other generation will follow."""

    def degraded(self, ref: ModelRef, ladder: Ladder, run: Run | None) -> None:
        """A run, or a load, goes on with less than was asked for."""

    def settle(self, now: float) -> None:
        """Something has changed: who waits for room or a place may have it now."""
