"""What the daemon's core may ask of the world. The server and the executor answer it; tests do too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

from xditd.daemon.groups import Group


class Ports(Protocol):
    """The four things that the core can do."""

    def answer(self, peer: bytes, reply: Struct, frames: Sequence[Any] = ()) -> None:
        """Send a reply or an event to a client."""

    def order(self, group: Group, order: Struct, *, peer: bytes | None = None, frames: Sequence[Any] = ()) -> None:
        """Send an order to every rank of a group; `peer` is the client whose segments it names."""

    def start(self, group: Group) -> None:
        """Start the group's rank processes."""

    def kill(self, group: Group) -> None:
        """Kill what is left of the group's rank processes."""
