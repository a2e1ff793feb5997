"""The runs that have not ended, found by their number, their client, or the group that has given them a place. Pure.

Who waits and who has a place is changed here and nowhere else, so that nobody has to look through all runs for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from xditd.daemon.groups import Group
from xditd.daemon.line import Line
from xditd.daemon.runs import Key, Run

Name = TypeVar("Name")


class Roster(Mapping[int, Run]):
    """Runs by number, in the order in which they were opened; those that wait for a place are in the `line`."""

    def __init__(self) -> None:
        self._runs: dict[int, Run] = {}
        self.line = Line()
        self._on: dict[str, dict[int, Run]] = {}  # by group
        self._of: dict[bytes, dict[int, Run]] = {}  # by client

    def __getitem__(self, number: int) -> Run:
        return self._runs[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def queued(self) -> Collection[Run]:
        """Those that wait for a place, in no order: `line` has one."""
        return self.line.runs.values()

    def on(self, group: Group) -> list[Run]:
        """Those that have a place on the group."""
        return list(self._on.get(group.name, {}).values())

    def count_on(self, group: Group) -> int:
        return len(self._on.get(group.name, ()))

    def of(self, client: bytes) -> list[Run]:
        return list(self._of.get(client, {}).values())

    def clients(self) -> set[bytes]:
        """Those that have a run."""
        return set(self._of)

    def held(self) -> Iterator[tuple[str, Collection[Run]]]:
        """By the name of a group: the runs that have a place on it."""
        return ((name, runs.values()) for name, runs in self._on.items())

    def waiting_for(self, key: Key) -> list[Run]:
        """Those that wait for a place and would take it on a group with this key."""
        return [run for run in self.queued if key in run.keys]

    # ------------------------------------------------------------------------------------------- changes

    def add(self, run: Run) -> None:
        """A run is new, and waits."""
        self._runs[run.id] = run
        if run.peer not in self._of:
            self.line.joined(run.peer, Counter(other.peer for _, runs in self.held() for other in runs))
        self._of.setdefault(run.peer, {})[run.id] = run
        self.line.add(run)

    def place(self, run: Run, group: Group) -> None:
        """A run that waits has a place on the group."""
        run.go("bind")
        run.group = group.name
        self.line.drop(run)
        self.line.given(run.peer)
        self._on.setdefault(group.name, {})[run.id] = run

    def take_back(self, run: Run) -> None:
        """A run has lost its place, and waits again."""
        run.go("unbind")
        self._leave_group(run)
        run.group = ""
        self.line.add(run)

    def move(self, run: Run, keys: tuple[Key, ...]) -> None:
        """A run that waits waits for other groups from now on."""
        self.line.drop(run)
        run.keys = keys
        self.line.add(run)

    def end(self, run: Run) -> None:
        """A run is over. It keeps the name of its group, for those who tell of its end."""
        run.go("end")
        del self._runs[run.id]
        self.line.drop(run)
        self._leave_group(run)
        _drop(self._of, run.peer, run)
        if run.peer not in self._of:
            self.line.left(run.peer)

    def _leave_group(self, run: Run) -> None:
        if run.group:
            _drop(self._on, run.group, run)


def _drop(table: dict[Name, dict[int, Run]], name: Name, run: Run) -> None:
    """Takes the run out of its set, and the set away with the last."""
    runs = table[name]
    del runs[run.id]
    if not runs:
        del table[name]
