"""What the daemon's core asks of the world (`clients.Clients`, `ranks.Ranks`, `devices.Memories`), and what it tells it
(`sight.Sight`). Tests are that world too.

And what the fleet tells the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from xditd.daemon.groups import Group
from xditd.daemon.runs import Asked, Key, Run
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

    def total_and_used(self, device: str) -> tuple[int | None, int | None]:
        """Bytes of a device, by all processes, whether they are counted or not."""


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


class Witness(Protocol):
    """All that the core tells of what happens, to whoever looks on: nothing that it does depends on it.

    Whoever must hear less than all inherits from this, and is deaf to the rest.
    """

    def run_opened(self, run: Run) -> None:
        """It waits for a place. Nothing else is told of a run before this."""

    def run_ended(self, run: Run) -> None:
        """Its one end; `run.code` and `run.problem` say why. Nothing is told of it afterwards."""

    def degraded(self, ref: ModelRef, why: str, run: Run | None) -> None:
        """A run, or a load where that is None, goes on with less than was asked for."""

    def turn_done(self, asked: Asked, seconds: float) -> None:
        """One more turn of a request is done, in so many seconds of the ranks."""

    def group_changed(self, group: Group) -> None:
        """It is in another state, by `group.state`. Of waiting for room nothing is told, nor of leaving before it was ready."""


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

    def lora_bytes(self, group: Group, now: float) -> int:
        """For LoRAs of how many bytes it should have room: those of the run that it takes next."""

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

    def no_room_for_loras(
        self, group: Group, alike: Sequence[Group], loras: int, message: str, now: float
    ) -> None:
        """It can never have room for LoRAs of so many bytes, nor can those `alike`. All of them serve on."""

    def settle(self, now: float) -> None:
        """Something has changed: who waits for room or a place may have it now."""
