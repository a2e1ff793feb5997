"""The states of the daemon, of a group and of a run, as tables and nothing else.

A table maps (state, event) to the next state. What is not in it is a bug of ours, never a client's: `after`
raises `IllegalTransition` and changes nothing. The daemon's life, seen from outside, is

    daemon   starting → serving → draining → stopping
    group    waiting → starting → ready → leaving → gone,   or → failed → gone from anywhere before
                                  ready → dozing → asleep → waking → ready
    run      queued → bound ⇄ working → ended,       and back to queued when its group dies
"""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[tuple[str, str], str]

DAEMON: Table = {
    ("starting", "ready"): "serving",
    ("starting", "stop"): "stopping",
    ("serving", "drain"): "draining",
    ("serving", "stop"): "stopping",
    ("draining", "drain"): "draining",
    ("draining", "stop"): "stopping",
    ("stopping", "stop"): "stopping",
}

GROUP: Table = {
    # It has no processes: it waits until there is memory for it.
    ("waiting", "admit"): "starting",
    ("waiting", "leave"): "gone",
    ("waiting", "fail"): "gone",
    # The rank processes are started, import, join their world and load the model.
    ("starting", "ranks_ready"): "ready",
    ("starting", "fail"): "failed",
    ("starting", "leave"): "leaving",
    # It serves turns.
    ("ready", "sleep"): "dozing",
    ("ready", "fail"): "failed",
    ("ready", "leave"): "leaving",
    # No run uses it: its ranks give the device's memory back and keep their weights, and take it again for the next run.
    ("dozing", "ranks_asleep"): "asleep",
    ("dozing", "fail"): "failed",
    ("dozing", "leave"): "leaving",
    ("asleep", "wake"): "waking",
    ("asleep", "fail"): "failed",
    ("asleep", "leave"): "leaving",
    ("waking", "ranks_ready"): "ready",
    ("waking", "fail"): "failed",
    ("waking", "leave"): "leaving",
    # Its ranks were told to leave; a rank that does not is killed.
    ("leaving", "fail"): "leaving",
    ("leaving", "leave"): "leaving",
    ("leaving", "ranks_gone"): "gone",
    # A rank died, hung or raised: all were killed. It never revives: another generation takes its place.
    ("failed", "fail"): "failed",
    ("failed", "leave"): "failed",
    ("failed", "ranks_gone"): "gone",
}

RUN: Table = {
    # It waits for a group that is ready.
    ("queued", "bind"): "bound",
    ("queued", "end"): "ended",
    # It holds a place on a group; nothing is under way.
    ("bound", "ask"): "working",
    ("bound", "unbind"): "queued",
    ("bound", "end"): "ended",
    # A request of its client is under way: waiting for a turn, or in one.
    ("working", "answer"): "bound",
    ("working", "unbind"): "queued",
    ("working", "end"): "ended",
}

GROUP_ALIVE = frozenset({"waiting", "starting", "ready", "dozing", "asleep", "waking"})
"""States in which runs may wait for a group or be bound to it."""

GROUP_LOADED = frozenset({"ready", "dozing", "asleep", "waking"})
"""States in which its ranks have the model and take orders."""

RUN_OVER = frozenset({"ended"})


class IllegalTransition(Exception):
    """An event came that the table does not know in that state."""


def after(table: Table, state: str, event: str) -> str:
    """The state that follows.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(f"no {event!r} in state {state!r}") from None
