"""Who waits for groups to be gone, or to sleep, and is then told what memory that has given back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from xditd.daemon.fleet import Fleet
from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort
from xditd.daemon.work import failed
from xditd.protocol import messages as m
from xditd.protocol.errors import Code


@dataclass(frozen=True, slots=True)
class Departure:
    """A request that had groups leave, or go to sleep, and the memory of their devices before."""

    peer: bytes
    message: m.Unload | m.Sleep | m.FreeMemory
    groups: Sequence[Group]
    before: tuple[m.MemoryStatus, ...]

    @property
    def over(self) -> bool:
        if isinstance(self.message, m.Sleep):
            return not any(group.state == "dozing" for group in self.groups)
        return all(group.state == "gone" for group in self.groups)


class Departures:
    """Those that are not over."""

    def __init__(self, clients: ClientPort, fleet: Fleet) -> None:
        self.clients = clients
        self.fleet = fleet
        self.waiting: list[Departure] = []

    def add(self, departure: Departure) -> None:
        """Groups were told to leave, or to sleep; answered at once where they have already."""
        self.waiting.append(departure)
        self.look()

    def look(self) -> None:
        """Answers those whose groups are gone, or asleep, with what memory there is now."""
        for departure in [one for one in self.waiting if one.over]:
            self.waiting.remove(departure)
            self.clients.answer(departure.peer, self._answer(departure))

    def memory(self, devices: Iterable[str]) -> tuple[m.MemoryStatus, ...]:
        """What devices say of their memory now, and what the models on them are counted with."""
        residency, groups = self.fleet.residency, self.fleet.groups.values()
        figures = {name: residency.memory.total_and_used(name) for name in devices}
        return tuple(
            m.MemoryStatus(device=name, total=total, used=used, models=residency.resident(groups, name))
            for name, (total, used) in figures.items()
        )

    def _answer(self, departure: Departure) -> Struct:
        message, before = departure.message, departure.before
        there = [one.device for one in before]
        names, after = tuple(group.name for group in departure.groups), self.memory(there)
        if isinstance(message, m.Unload):
            return m.Unloaded(re=message.id, groups=names, before=before, after=after)
        if isinstance(message, m.Sleep):
            ended = next((group for group in departure.groups if not group.alive), None)
            if ended is None:
                return m.Slept(re=message.id, groups=names, before=before, after=after)
            why = ended.problem or f"{ended.name} ended on its way to sleep."
            return failed(message.id, ended.code or Code.RANK_LOST, why)
        stayed = tuple(
            group.name
            for group in self.fleet.groups.values()
            if group.alive and self.fleet.listener.uses(group) and not set(there).isdisjoint(group.devices)
        )
        return m.MemoryFreed(re=message.id, groups=names, in_use=stayed, before=before, after=after)
