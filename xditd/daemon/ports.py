"""What the daemon's core may ask of the world. `clients.Clients` and `ranks.Ranks` answer it; tests do too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from xditd.daemon.groups import Group

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
