"""The line of runs that wait for a place on a group: in which order they are let in. Pure.

Clients come in turn, whatever number of runs each has. A higher priority goes first, and every minute of waiting counts
as much as one step of priority: so nothing waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xditd.daemon.runs import Run

AGEING = 60.0
"""Seconds of waiting that are worth one step of priority."""


def in_order(waiting: Iterable[Run], had: Mapping[bytes, int], now: float) -> list[Run]:
    """The runs in the order in which they are let in.

    Args:
        had: by client, how many places it was given already.
    """
    runs = sorted(waiting, key=lambda run: (-_level(run, now), run.id))
    rounds = dict(had)
    keys: dict[int, tuple[int, int, int]] = {}
    for run in runs:
        turn = rounds.get(run.peer, 0)
        rounds[run.peer] = turn + 1
        keys[run.id] = (-_level(run, now), turn, run.id)
    return sorted(runs, key=lambda run: keys[run.id])


def _level(run: Run, now: float) -> int:
    return run.priority + int((now - run.opened) / AGEING)
