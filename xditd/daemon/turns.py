"""Who runs next on which devices. A turn holds all devices of its group; runs take turns of one step each.

First come, first served, but a run whose devices are free may pass one whose devices are not, as long as it
takes none of the devices that the earlier one waits for: so nothing starves and nothing stands idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

from xditd.daemon.groups import Group


class Turns:
    """The runs that wait for a turn, the devices that turns are on, and the turns under way by their number."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.busy: set[str] = set()
        self.under_way: dict[int, int] = {}  # number of the turn → run
        self._next = count(1)

    def ask(self, run: int) -> None:
        """The run waits for its next turn, behind all that wait."""
        self.waiting.append(run)

    def forget(self, run: int) -> None:
        """The run waits no longer."""
        if run in self.waiting:
            self.waiting.remove(run)

    def next(self, devices_of: Callable[[int], Iterable[str] | None]) -> int | None:
        """The run whose turn it is; None while there is none.

        Args:
            devices_of: the devices that a waiting run needs, None while it has no ready group.
        """
        spoken_for = set(self.busy)
        for index, run in enumerate(self.waiting):
            devices = devices_of(run)
            if devices is None:
                continue
            needed = set(devices)
            if needed.isdisjoint(spoken_for):
                del self.waiting[index]
                return run
            spoken_for |= needed
        return None

    def begin(self, run: int, group: Group, now: float) -> int:
        """The run's turn begins on the group: its devices are busy. Returns the turn's number."""
        number = next(self._next)
        self.under_way[number] = run
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
        return self.under_way.pop(number)

    def has(self, run: int) -> bool:
        """Whether the run is in a turn now."""
        return run in self.under_way.values()
