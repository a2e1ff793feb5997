"""Who runs next on which devices. A turn holds all devices of its group; runs take turns of one step each.

On one group the client goes first that has had least of it: seconds of turns, halved for each step of priority. So
a client with eight runs gets as much as one with a single run, and one with large pictures no more than one with small.
Who comes back after a pause begins where those are who stayed, and so owes and is owed nothing.

Between groups it is first come, first served, but a run whose devices are free may pass one whose devices are not,
as long as it takes none of the devices that the earlier one waits for: so nothing starves and nothing stands idle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, count

from xditd.daemon.groups import Group

LEAST = 1e-4
"""Seconds that every turn counts at least, so that turns that take no time are dealt out evenly too."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run that waits for its next turn, or is in it."""

    run: int
    client: bytes
    group: str
    priority: int
    number: int  # in the order of asking


@dataclass(slots=True)
class Queue:
    """Who waits for a turn of one group, who is in one, and what its clients have had of it.

    Who is first is found out once for every change, among the runs of this group alone: there is a turn of some group
    every few milliseconds, and hundreds of runs on others.
    """

    devices: frozenset[str]
    waiting: dict[int, Waiting] = field(default_factory=dict)  # by run
    under_way: Waiting | None = None
    had: dict[bytes, float] = field(default_factory=dict)  # seconds by client
    _first: Waiting | None = None

    def add(self, one: Waiting) -> None:
        """A client that comes, or comes back, begins where those are who stayed."""
        there = self.waiting.values() if self.under_way is None else (*self.waiting.values(), self.under_way)
        least = min((self.had[o.client] for o in there if o.client in self.had), default=0.0)
        self.had[one.client] = max(self.had.get(one.client, 0.0), least)
        self.waiting[one.run] = one
        self._first = None

    def take(self, run: int) -> Waiting | None:
        self._first = None
        return self.waiting.pop(run, None)

    def begin(self, run: int) -> None:
        self._first = None
        self.under_way = self.waiting.pop(run)

    def over(self, seconds: float) -> Waiting:
        """The turn has ended; it took so long."""
        one = self.under_way
        assert one is not None
        self.under_way = self._first = None
        if one.client in self.had:
            self.had[one.client] += max(seconds, LEAST) / 2.0**one.priority
        return one

    def forget(self, client: bytes) -> None:
        self._first = None
        self.had.pop(client, None)

    def first(self) -> Waiting | None:
        """Whose turn it is, when the devices are free."""
        if self._first is None and self.waiting:
            self._first = min(self.waiting.values(), key=self._order)
        return self._first

    def in_order(self) -> list[Waiting]:
        return sorted(self.waiting.values(), key=self._order)

    def _order(self, one: Waiting) -> tuple[float, int, int]:
        return self.had.get(one.client, 0.0), -one.priority, one.number


class Turns:
    """The runs that wait for a turn, the devices that turns are on, and the turns under way by their number."""

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}  # by group
        self.busy: set[str] = set()
        self.under_way: dict[int, Waiting] = {}  # by the number of the turn
        self._on: dict[int, str] = {}  # run that waits → group
        self._asked = count(1)
        self._next = count(1)

    def ask(self, run: int, client: bytes, group: Group, priority: int = 0) -> None:
        """The run waits for its next turn on the group."""
        queue = self.queues.get(group.name)
        if queue is None:
            queue = self.queues[group.name] = Queue(frozenset(group.devices))
        queue.add(Waiting(run, client, group.name, priority, next(self._asked)))
        self._on[run] = group.name

    def forget(self, run: int) -> None:
        """The run waits no longer."""
        group = self._on.pop(run, None)
        if group is not None:
            self.queues[group].take(run)

    def forget_client(self, client: bytes) -> None:
        """A client is gone; a turn of it may still be under way."""
        for queue in self.queues.values():
            queue.forget(client)

    def forget_group(self, group: str) -> None:
        """The group is gone, and with it what its clients have had of it."""
        self.queues.pop(group, None)

    def next(self) -> int | None:
        """The run whose turn it is; None while there is none."""
        firsts = [(one, queue) for queue in self.queues.values() if (one := queue.first()) is not None]
        firsts.sort(key=lambda pair: pair[0].number)
        spoken_for: Iterable[str] = self.busy
        for one, queue in firsts:
            if queue.devices.isdisjoint(spoken_for):
                return one.run
            spoken_for = queue.devices.union(spoken_for)
        return None

    def begin(self, run: int, group: Group, now: float) -> int:
        """The run's turn begins on the group: its devices are busy. Returns the turn's number."""
        number = next(self._next)
        queue = self.queues[self._on.pop(run)]
        self.under_way[number] = queue.waiting[run]
        queue.begin(run)
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
        del self.under_way[number]
        return self.queues[group.name].over(now - group.turn_since).run

    def has(self, run: int) -> bool:
        """Whether the run is in a turn now."""
        return any(one.run == run for one in self.under_way.values())

    def positions(self) -> dict[int, int]:
        """By run that waits: how many get a turn on its group before it, as things are."""
        lines = (enumerate(queue.in_order()) for queue in self.queues.values())
        return {one.run: before for before, one in chain.from_iterable(lines)}
