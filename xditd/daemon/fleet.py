"""All groups: which there are, how they start, serve, fail, are replaced and leave. Decides; does nothing itself.

A group that fails is killed whole. When its last rank is gone and somebody still wants it, the next generation
starts under the same name, until the model has failed too often. What this means for runs is the dispatcher's:
it listens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Protocol

from xditd.catalog.catalog import Found
from xditd.daemon.groups import Group, Restarts
from xditd.daemon.ports import ClientPort, RankPort
from xditd.daemon.runs import Key
from xditd.daemon.work import failed, spell
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code, XditError

LOST = frozenset({Code.RANK_LOST.value, Code.DEADLINE_EXCEEDED.value})
"""Codes of a group whose ranks died or hung. Another group may well do what this one could not."""

_NEAREST = ("ready", "starting", "failed", "leaving", "gone")
"""States by how soon a group in them, or its replacement, serves."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase may take. The first turn may compile."""

    load: float
    first_turn: float
    turn: float
    leave: float
    run_idle: float


@dataclass(frozen=True, slots=True)
class Waiter:
    """A client's `load` that waits for a group."""

    peer: bytes
    request: int
    since: float


class Listener(Protocol):
    """Who must know what becomes of groups."""

    def wanted(self, group: Group) -> bool:
        """Whether a run waits for such a group."""

    def group_starting(self, group: Group) -> None:
        """Its slowest rank has come to another phase."""

    def group_ready(self, group: Group, now: float) -> None:
        """It serves from now on."""

    def group_failed(self, group: Group, now: float) -> None:
        """It was killed; `group.code` and `group.problem` say why."""

    def group_gone(self, group: Group, now: float) -> None:
        """Its last rank has ended."""

    def given_up(self, group: Group, code: Code | str, message: str, now: float) -> None:
        """No other generation will follow."""


class Fleet:
    """The groups of a daemon, by name."""

    def __init__(
        self,
        clients: ClientPort,
        ranks: RankPort,
        deadlines: Deadlines,
        restarts: Restarts,
        listener: Listener,
    ) -> None:
        self.clients = clients
        self.ranks = ranks
        self.deadlines = deadlines
        self.restarts = restarts
        self.listener = listener
        self.groups: dict[str, Group] = {}
        self.closed = False  # nothing starts any more
        self._waiters: dict[str, list[Waiter]] = {}
        self._names = count(1)

    # ---------------------------------------------------------------------------------------- on request

    def want(self, key: Key, ref: m.ModelRef, found: Found, now: float) -> Group:
        """The group for a key: one that serves, one that will, or a new one.

        Raises:
            XditError: `model_failed` while the model's failures are over the limit.
        """
        present = [group for group in self.groups.values() if group.key == key]
        if present:
            return min(present, key=lambda group: _NEAREST.index(group.state))
        if self.restarts.exhausted(key, now):
            raise XditError(
                Code.MODEL_FAILED,
                f"{ref.name} failed {self.restarts.limit} times within {self.restarts.window:g} s and is not "
                f"started again by itself; see the log, then load it explicitly.",
            )
        return self._start(f"g{next(self._names)}", 1, ref, found, key, now)

    def load(self, peer: bytes, request: m.Load, found: Found, key: Key, now: float) -> None:
        """Has a group ready; `Loaded` follows. An explicit load forgives earlier failures."""
        self.restarts.forgive(key)
        group = self.want(key, request.model, found, now)
        if group.state == "ready":
            self.clients.answer(peer, _loaded(request.id, group, 0.0, warm=True))
            return
        self._waiters.setdefault(group.name, []).append(Waiter(peer, request.id, now))
        self.clients.answer(peer, m.Queued(re=request.id, run=None, position=0, phase=group.phase))

    def leave(self, group: Group, now: float) -> None:
        """Tells a group to end orderly; one that still starts is killed."""
        if not group.alive:
            return
        serving = group.state == "ready"
        group.go("leave")
        group.left_at = now
        if serving:
            self.ranks.order(group, o.Leave())
        else:
            self.ranks.kill(group)

    def close(self, now: float) -> None:
        """The daemon stops: every group leaves, and nothing starts any more."""
        self.closed = True
        for group in list(self.groups.values()):
            if group.state == "gone":  # between two generations
                self._replace(group, 0.0, now)
            else:
                self.leave(group, now)

    def forget_peer(self, peer: bytes) -> None:
        """A client is gone: nobody waits for its loads."""
        for name, waiters in self._waiters.items():
            self._waiters[name] = [waiter for waiter in waiters if waiter.peer != peer]

    # ---------------------------------------------------------------------------------------- from ranks

    def rank_phase(self, group: Group, report: o.RankPhase) -> None:
        before, rank = group.phase, group.ranks[report.rank]
        rank.pid = report.pid
        if not rank.gone:
            rank.phase = report.phase
        if group.state != "starting" or group.phase == before:
            return
        for waiter in self._waiters.get(group.name, ()):
            event = m.Queued(re=waiter.request, run=None, position=0, phase=group.phase)
            self.clients.answer(waiter.peer, event)
        self.listener.group_starting(group)

    def rank_ready(self, group: Group, report: o.RankReady, now: float) -> None:
        rank = group.ranks[report.rank]
        rank.phase = "ready"
        rank.device_memory = report.device_memory
        rank.attention = report.attention
        if group.state != "starting" or not group.all_ready:
            return
        group.go("ranks_ready")
        group.ready_after = now - group.started
        group.used = now
        for waiter in self._waiters.pop(group.name, []):
            loaded = _loaded(waiter.request, group, now - waiter.since, warm=False)
            self.clients.answer(waiter.peer, loaded)
        self.listener.group_ready(group, now)

    def rank_gone(self, group: Group, rank: int, how: str, now: float) -> None:
        """A rank process has ended. Unless it was told to, the group fails."""
        group.ranks[rank].phase = "gone"
        if group.alive:
            self.fail(group, Code.RANK_LOST, f"Rank {rank} (pid {group.ranks[rank].pid}) {how}", now)
        if group.all_gone and group.state in ("leaving", "failed"):
            group.go("ranks_gone")
            self.listener.group_gone(group, now)
            self._replace(group, self.restarts.delay(group.key), now)

    def fail(self, group: Group, code: Code | str, problem: str, now: float) -> None:
        """Kills the group. A load that raised, or took too long, would again: it is given up at once."""
        if not group.alive:
            return
        was_starting = group.state == "starting"
        group.go("fail")
        group.code, group.problem, group.left_at = spell(code), problem, now
        self.restarts.failed(group.key, now)
        self.ranks.kill(group)
        self.listener.group_failed(group, now)
        if was_starting and group.code != Code.RANK_LOST.value:
            told = Code.LOAD_FAILED if group.code == Code.RANK_FAILED.value else group.code
            self._give_up(group, told, now)

    # ------------------------------------------------------------------------------------ from the clock

    def tick(self, now: float) -> None:
        """Deadlines of starting groups, of turns, of groups that should be gone."""
        limit = self.deadlines
        for group in list(self.groups.values()):
            if group.state == "starting" and now - group.started > limit.load:
                problem = f"It was not ready within {limit.load:g} s (deadlines.load): still {group.phase}"
                self.fail(group, Code.DEADLINE_EXCEEDED, problem, now)
            elif group.state == "ready" and group.turn is not None:
                allowed = limit.turn if group.turns else limit.first_turn
                if now - group.turn_since > allowed:
                    problem = f"A turn took longer than {allowed:g} s (deadlines.turn): a rank hangs"
                    self.fail(group, Code.DEADLINE_EXCEEDED, problem, now)
            elif group.state == "gone":
                if group.restart_at is not None and now >= group.restart_at:
                    self._replace(group, 0.0, now)
            elif group.left_at is not None and now - group.left_at > limit.leave:
                group.left_at = now
                self.ranks.kill(group)

    # -------------------------------------------------------------------------------------------- inside

    def _start(
        self, name: str, generation: int, ref: m.ModelRef, found: Found, key: Key, now: float
    ) -> Group:
        group = Group(name, generation, ref, found, key, started=now, used=now)
        self.groups[name] = group
        self.ranks.start(group)
        return group

    def _replace(self, group: Group, delay: float, now: float) -> None:
        """Its ranks are gone: if somebody waits for it, the next generation starts, after `delay` seconds."""
        group.restart_at = None
        if self.closed:
            del self.groups[group.name]
            self._give_up(group, Code.STOPPING, now)
        elif not self.listener.wanted(group) and not self._waiters.get(group.name):
            del self.groups[group.name]
        elif self.restarts.exhausted(group.key, now):
            del self.groups[group.name]
            self._give_up(group, Code.MODEL_FAILED, now)
        elif delay:
            group.restart_at = now + delay
        else:
            self._start(group.name, group.generation + 1, group.ref, group.found, group.key, now)

    def _give_up(self, group: Group, code: Code | str, now: float) -> None:
        message = f"{group.ref.name} could not be served. {group.problem}".rstrip(".") + "."
        for waiter in self._waiters.pop(group.name, []):
            self.clients.answer(waiter.peer, failed(waiter.request, code, message))
        self.listener.given_up(group, code, message, now)


def _loaded(request: int, group: Group, seconds: float, *, warm: bool) -> m.Loaded:
    return m.Loaded(
        re=request,
        group=group.name,
        plan=group.key.plan,
        model=group.found.info,
        dtype=group.key.dtype,
        seconds=seconds,
        warm=warm,
    )
