"""The line of runs that wait for a place on a group: in which order they are let in. Pure.

Clients come in turn, whatever number of runs each has. A higher priority goes first, and every minute of waiting counts
as much as one step of priority: so nothing waits for ever.

A place is given away every few milliseconds while hundreds may wait, so nobody looks through all of them for it: runs
that wait for the same replicas with the same LoRAs are kept together, by client, and with each client who of it comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xditd.daemon.runs import Key, Run
from xditd.protocol.orders import Merge

AGEING = 60.0
"""Seconds of waiting that are worth one step of priority."""

LOOK = 1.0
"""Seconds between two looks at who has waited for another minute."""

Kind = tuple[tuple[Key, ...], tuple[Merge, ...]]
"""What a run waits for: replicas, any of which may take it, and the LoRAs that they must have merged."""

Head = tuple[int, int, int]
"""Of a client's first run, in the order of being let in: what goes against it, places its client was given, number."""


class Line:
    """The runs that wait, and how many places each client was given."""

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self._given: dict[bytes, int] = {}  # places by client, of those that have runs
        self._waiting: dict[Kind, dict[bytes, dict[int, Run]]] = {}
        self._heads: dict[Kind, dict[bytes, Head]] = {}
        self._looked = 0.0  # monotonic seconds of the last look at how long who waits

    def joined(self, client: bytes, held: Mapping[bytes, int]) -> None:
        """A client has a run. One that is new begins where the others were before the places that they hold now.

        Args:
            held: places by client.
        """
        if client not in self._given:
            before = (given - held.get(other, 0) for other, given in self._given.items())
            self._given[client] = min(before, default=0)

    def left(self, client: bytes) -> None:
        """The client has no run any more."""
        self._given.pop(client, None)

    def add(self, run: Run) -> None:
        """A run waits."""
        self.runs[run.id] = run
        self._waiting.setdefault(_kind(run), {}).setdefault(run.peer, {})[run.id] = run
        self._look_at(_kind(run), run.peer)

    def drop(self, run: Run) -> None:
        """A run does not wait any more, if it did."""
        if self.runs.pop(run.id, None) is not None:
            del self._waiting[_kind(run)][run.peer][run.id]
            self._look_at(_kind(run), run.peer)

    def given(self, client: bytes) -> None:
        """The client was given a place."""
        self._given[client] = self._given.get(client, 0) + 1
        for kind, clients in self._waiting.items():
            if client in clients:
                self._look_at(kind, client)

    def firsts(self, now: float) -> list[Run]:
        """Of those that wait for the same, the run that is let in next; of all of these, the first first."""
        if now - self._looked >= LOOK:
            self._looked = now
            for kind, clients in self._waiting.items():
                for client in clients:
                    self._look_at(kind, client)
        return [
            self.runs[head[2]] for head in sorted(min(clients.values()) for clients in self._heads.values())
        ]

    def in_order(self, now: float) -> list[Run]:
        """All runs, in the order in which they are let in if there is room for all."""
        levels = {run.id: _level(run, now) for run in self.runs.values()}
        runs = sorted(self.runs.values(), key=lambda run: (-levels[run.id], run.id))
        rounds = dict(self._given)
        order: dict[int, Head] = {}
        for run in runs:
            turn = rounds.get(run.peer, 0)
            rounds[run.peer] = turn + 1
            order[run.id] = (-levels[run.id], turn, run.id)
        return sorted(runs, key=lambda run: order[run.id])

    def _look_at(self, kind: Kind, client: bytes) -> None:
        """Finds out anew who of a client comes first among those that wait for the same; forgets who has nobody."""
        runs = self._waiting[kind][client]
        if runs:
            level, number = min(self._levels(runs.values()))
            self._heads.setdefault(kind, {})[client] = level, self._given.get(client, 0), number
            return
        del self._waiting[kind][client], self._heads[kind][client]
        if not self._waiting[kind]:
            del self._waiting[kind], self._heads[kind]

    def _levels(self, runs: Iterable[Run]) -> Iterable[tuple[int, int]]:
        return ((-_level(run, self._looked), run.id) for run in runs)


def _kind(run: Run) -> Kind:
    return run.keys, run.loras


def _level(run: Run, now: float) -> int:
    return run.priority + int(max(now - run.opened, 0.0) / AGEING)
