"""Who runs next on which devices. A turn holds all devices of its group; runs take turns of one step each.

On one group the client goes first that has had least of it: seconds of turns, halved for each step of priority. So
a client with eight runs gets as much as one with a single run, and one with large pictures no more than one with small.
Who comes back after a pause begins where those are who stayed, and so owes and is owed nothing.

Between groups it is first come, first served, but a run whose devices are free may pass one whose devices are not,
as long as it takes none of the devices that the earlier one waits for: so nothing starves and nothing stands idle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count

from xditd.daemon.groups import Group

LEAST = 1e-4
"""Seconds that every turn counts at least, so that turns that take no time are dealt out evenly too."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run that waits for its next turn, or is in it."""

    run: int
    client: bytes
    group: str
    devices: frozenset[str]
    priority: int
    number: int  # in the order of asking


class Turns:
    """The runs that wait for a turn, the devices that turns are on, and the turns under way by their number."""

    def __init__(self) -> None:
        self.waiting: dict[int, Waiting] = {}  # by run
        self.busy: set[str] = set()
        self.under_way: dict[int, Waiting] = {}  # by the number of the turn
        self._had: dict[str, dict[bytes, float]] = {}  # group → client → seconds that it has had
        self._asked = count(1)
        self._next = count(1)

    def ask(self, run: int, client: bytes, group: Group, priority: int = 0) -> None:
        """The run waits for its next turn on the group."""
        had = self._had.setdefault(group.name, {})
        others = [*self.waiting.values(), *self.under_way.values()]
        least = min((had[o.client] for o in others if o.group == group.name and o.client in had), default=0.0)
        had[client] = max(had.get(client, 0.0), least)
        self.waiting[run] = Waiting(
            run, client, group.name, frozenset(group.devices), priority, next(self._asked)
        )

    def forget(self, run: int) -> None:
        """The run waits no longer."""
        self.waiting.pop(run, None)

    def forget_client(self, client: bytes) -> None:
        """A client is gone; a turn of it may still be under way."""
        for had in self._had.values():
            had.pop(client, None)

    def forget_group(self, group: str) -> None:
        """The group is gone, and with it what its clients have had of it."""
        self._had.pop(group, None)

    def next(self) -> int | None:
        """The run whose turn it is; None while there is none."""
        first: dict[str, Waiting] = {}
        for one in self.waiting.values():
            other = first.get(one.group)
            if other is None or self._order(one) < self._order(other):
                first[one.group] = one
        spoken_for = set(self.busy)
        for one in sorted(first.values(), key=lambda one: one.number):
            if one.devices.isdisjoint(spoken_for):
                return one.run
            spoken_for |= one.devices
        return None

    def begin(self, run: int, group: Group, now: float) -> int:
        """The run's turn begins on the group: its devices are busy. Returns the turn's number."""
        number = next(self._next)
        self.under_way[number] = self.waiting.pop(run)
        self.busy.update(group.devices)
        group.turn, group.turn_since, group.used = number, now, now
        return number

    def over(self, group: Group, number: int | None, now: float) -> int | None:
        """A turn of the group has ended: its devices are free.

        Returns:
            The run whose turn it was; None where the number is of a turn that is long over: a late report.
        """
        if number is None or group.turn != number:
            return None
        group.turn, group.used = None, now
        self.busy.difference_update(group.devices)
        one = self.under_way.pop(number)
        had = self._had.get(group.name, {})
        if one.client in had:
            had[one.client] += max(now - group.turn_since, LEAST) / 2.0**one.priority
        return one.run

    def has(self, run: int) -> bool:
        """Whether the run is in a turn now."""
        return any(one.run == run for one in self.under_way.values())

    def positions(self) -> dict[int, int]:
        """By run that waits: how many get a turn on its group before it, as things are."""
        ahead: Counter[str] = Counter()
        positions: dict[int, int] = {}
        for one in sorted(self.waiting.values(), key=self._order):
            positions[one.run] = ahead[one.group]
            ahead[one.group] += 1
        return positions

    def _order(self, one: Waiting) -> tuple[float, int, int]:
        return self._had[one.group].get(one.client, 0.0), -one.priority, one.number
