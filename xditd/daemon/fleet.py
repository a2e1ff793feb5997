"""All groups: which there are, how they start, serve, fail, are replaced and leave. Decides; does nothing itself.

A group starts when there is memory for it; models that no run uses make room (`residency`). One that fails is killed whole, and its
next generation starts while somebody wants it, until the model has failed too often. What this means for runs is the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from xditd.catalog.catalog import Found
from xditd.daemon import states
from xditd.daemon.deadlines import Deadlines
from xditd.daemon.fallback import Ladder, Lately
from xditd.daemon.groups import Group, Restarts, nearest
from xditd.daemon.loads import Load, Loads
from xditd.daemon.ports import ClientPort, Listener, RankPort, Witness
from xditd.daemon.residency import Residency
from xditd.daemon.runs import Key
from xditd.daemon.work import spell
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code, XditError

LOST = frozenset({Code.RANK_LOST.value, Code.DEADLINE_EXCEEDED.value})
"""Codes of a group whose ranks died or hung. Another group may well do what this one could not."""


class Fleet:
    """The groups of a daemon, by name."""

    def __init__(
        self,
        clients: ClientPort,
        ranks: RankPort,
        witness: Witness,
        deadlines: Deadlines,
        restarts: Restarts,
        residency: Residency,
        listener: Listener,
    ) -> None:
        self.clients = clients
        self.ranks = ranks
        self.witness = witness
        self.deadlines = deadlines
        self.restarts = restarts
        self.residency = residency
        self.listener = listener
        self.groups: dict[str, Group] = {}
        self.held: frozenset[str] = frozenset()  # groups that take no further run: their memory is needed
        self.unsettled = False  # since somebody settled last, a place is free or another group wanted
        self.lately = Lately(restarts.window)
        self.loads = Loads(clients, self._lower)
        self.closed = False  # nothing starts any more
        self._names = count(1)

    # ---------------------------------------------------------------------------------------- on request

    def want(
        self, keys: tuple[Key, ...], ref: m.ModelRef, found: Found, now: float, degraded: str = ""
    ) -> None:
        """Has one replica at least come to serve, and the others where that drives nobody out.

        Raises:
            XditError: `model_failed` while the model's failures are over the limit, `out_of_memory` where it is
                larger than the memory there is.
        """
        problem: XditError | None = None
        there = any(group.key in keys and group.state != "gone" for group in self.groups.values())
        for key in keys:
            try:
                self._get(key, ref, found, now, spare=there, degraded=degraded)
                there = True
            except XditError as error:
                problem = problem or error
        if not there and problem is not None:
            raise problem

    def load(
        self,
        peer: bytes,
        request: m.Load,
        found: Found,
        keys: tuple[Key, ...],
        now: float,
        loras: tuple[m.LoraMatch, ...] = (),
        ladder: Ladder | None = None,
    ) -> None:
        """Has every replica ready; `Loaded` follows. An explicit load forgives earlier failures."""
        load = Load(peer, request.id, request.model, found, now, keys, ladder or Ladder(), loras)
        self._ask_for(load, now)
        self.loads.add(load, self.groups.values(), now)
        self.listener.settle(now)
        self.loads.tell(load, self.groups.values())

    def leave(self, group: Group, now: float) -> None:
        """Tells a group to end orderly; one that still starts is killed."""
        if not group.alive:
            return
        before = group.state
        group.go("leave")
        group.left_at = now
        if before == "waiting":
            self._gone(group, now)
        elif before in states.GROUP_LOADED:
            self.witness.group_changed(group)
            self.ranks.order(group, o.Leave())
        else:
            self.ranks.kill(group)

    def sleep(self, group: Group, now: float) -> None:
        """Tells a group that no run uses to give its devices' memory back."""
        group.go("sleep")
        group.started, group.asked = now, None
        group.slept += 1
        self.witness.group_changed(group)
        self.ranks.order(group, o.Sleep())

    def close(self, now: float) -> None:
        """The daemon stops: every group leaves, and nothing starts any more."""
        self.closed = True
        for group in list(self.groups.values()):
            if group.state == "gone":  # between two generations
                self._replace(group, 0.0, now)
            else:
                self.leave(group, now)

    def admit(self, now: float) -> None:
        """Starts and wakes groups that wait for room, finds some for LoRAs of those that serve; models that no run uses make it.

        They come in the order in which they were asked for: one that was put to sleep for another, and is wanted again at
        once, is behind that other.

        A further replica, one that nobody depends on, drives nobody out: it comes where there is room, or not.

        A group that waits in vain keeps those behind it out of the memory that it needs, and after a while
        (`Residency.patience`) has runs kept off the groups that are in its way: so it comes to its turn.
        """
        waiting: list[Group] = []
        for group in self.groups.values():
            called = group.state == "asleep" and self._called(group)
            lacks = group.state == "ready" and not group.has_room_for(self.listener.lora_bytes(group, now))
            if group.state == "waiting" or called or lacks:
                group.asked = now if group.asked is None else group.asked
                waiting.append(group)
            elif group.state in ("asleep", "ready"):  # who called is gone: the next has waited for no time
                group.asked = None
        waiting.sort(key=lambda group: group.asked or now)
        spoken_for: set[str] = set()
        held: set[str] = set()
        before: set[Key] = set()
        short: list[tuple[Group, int]] = []  # that can never have room for LoRAs of so many bytes
        for group in waiting:
            needs = set(self.residency.needs(group.found, group.key))
            if group.state == "waiting" and not self._wanted(group):
                self.leave(group, now)
            elif spoken_for.isdisjoint(needs):
                loras = self.listener.lora_bytes(group, now)
                verdict = self.residency.decide(group, [*self.groups.values()], self._in_use, now, loras)
                if verdict.fits:
                    self._admit(group, loras, now)
                    continue
                if group.spare and not self.listener.depends(group):
                    del self.groups[group.name]
                    continue
                if group.state == "asleep" and self._further(group, before):
                    continue
                if verdict.never:
                    if group.has_room_for(loras):
                        self.fail(group, Code.OUT_OF_MEMORY, verdict.never, now, verdict.where)
                    else:  # for LoRAs alone
                        alike = [one for one, lacking in short if lacking <= loras]
                        short.append((group, loras))
                        self.listener.no_room_for_loras(group, alike, loras, f"{verdict.never}.", now)
                    continue
                held |= {one.name for one in verdict.hold}
                for one in verdict.sleep:
                    self.sleep(one, now)
                for one in verdict.evict:
                    one.problem = f"Ended to make room for {group.ref.name}"
                    self.leave(one, now)
            spoken_for |= needs
            before.add(group.key)
        self.held = frozenset(held)

    def free_memory(self, nbytes: int, devices: Sequence[str], now: float) -> list[Group]:
        """Ends models that no run uses, until each device has so many bytes back; 0 is all. Returns the groups."""
        groups = list(self.groups.values())
        chosen = self.residency.to_free(nbytes, devices, groups, self._in_use, now)
        for group in chosen:
            group.problem = "Ended to give memory back"
            self.leave(group, now)
        return chosen

    # ---------------------------------------------------------------------------------------- from ranks

    def rank_phase(self, group: Group, report: o.RankPhase, now: float) -> None:
        before, rank = (group.phase, group.progress), group.ranks[report.rank]
        rank.pid = report.pid
        if not rank.gone:
            rank.phase, rank.loaded, rank.total = report.phase, report.loaded, report.total
        if group.state != "starting" or (group.phase, group.progress) == before:
            return
        self.loads.group_starting(group)
        self.listener.group_starting(group, now)

    def rank_ready(self, group: Group, report: o.RankReady, now: float) -> None:
        group.ranks[report.rank].ready(report)
        if group.state == "starting" and group.all_ready:
            group.ready_after = now - group.started
            self._ready(group, now)

    def rank_rested(self, group: Group, report: o.RankRested, now: float) -> None:
        """A rank sleeps, or is awake again."""
        rank = group.ranks[report.rank]
        if rank.gone:
            return
        rank.phase = "asleep" if report.asleep else "ready"
        rank.device_memory = report.device_memory
        if group.state == "dozing" and group.all_asleep:
            group.go("ranks_asleep")
            group.resting = True
            self.witness.group_changed(group)
            self.listener.group_asleep(group, now)
            self.listener.settle(now)
        elif group.state == "waking" and group.all_ready:
            self._ready(group, now)

    def rank_gone(self, group: Group, rank: int, how: str, now: float) -> None:
        """A rank process has ended. Unless it was told to, the group fails."""
        one = group.ranks[rank]
        one.phase = "gone"
        if group.alive:
            who = f"Rank {rank} (pid {one.pid})" if one.pid else f"Rank {rank}"
            self.fail(group, Code.RANK_LOST, f"{who} {how}", now, one.device)
        if group.all_gone and group.state in ("leaving", "failed"):
            group.go("ranks_gone")
            self._gone(group, now)
        self.listener.settle(now)

    def fail(
        self,
        group: Group,
        code: Code | str,
        problem: str,
        now: float,
        culprit: str = "",
        *,
        strike: bool = True,
    ) -> None:
        """Kills the group. A load that raised, or took too long, would again: it is given up at once.

        Args:
            culprit: the device on which it happened, if it is known.
            strike: whether it counts against the model, and as a loss of the requests under way; what an order of one
                run's own brought about does not.
        """
        if not group.alive:
            return
        before = group.state
        group.go("fail")
        group.code, group.problem, group.left_at, group.culprit = spell(code), problem, now, culprit
        group.excused = not strike
        if before == "waiting":  # it never had a process: nothing failed that could be tried again
            del self.groups[group.name]
            self._give_up(group, code, now)
            return
        if strike:
            self.restarts.failed(group.key, now)
        self.ranks.kill(group)
        self.witness.group_changed(group)
        self.listener.group_failed(group, now)
        if before == "starting" and group.code != Code.RANK_LOST.value:
            told = Code.LOAD_FAILED if group.code == Code.RANK_FAILED.value else group.code
            self._give_up(group, told, now)
        self.listener.settle(now)

    # ------------------------------------------------------------------------------------ from the clock

    def tick(self, now: float) -> None:
        """Deadlines of starting groups, of turns, of groups that should be gone."""
        for group in list(self.groups.values()):
            if problem := self.deadlines.overdue(group, now):
                self.fail(group, Code.DEADLINE_EXCEEDED, problem, now)
            elif group.state == "gone":
                if group.restart_at is not None and now >= group.restart_at:
                    self._replace(group, 0.0, now)
            elif group.left_at is not None and now - group.left_at > self.deadlines.leave:
                group.left_at = now
                self.ranks.kill(group)
        for group in self.residency.expired(self.groups.values(), self._in_use, now):
            group.problem = f"No run used it for {self.residency.keep.seconds(group):g} s"
            self.leave(group, now)
        while (sleepy := self.residency.sleepy(list(self.groups.values()), self._in_use, now)) is not None:
            self.sleep(sleepy, now)

    # -------------------------------------------------------------------------------------------- inside

    def _admit(self, group: Group, loras: int, now: float) -> None:
        """There is room for it, and for so many bytes of LoRAs."""
        group.lora_bytes = max(loras, group.lora_bytes if group.state == "ready" else 0)
        if group.state == "ready":
            group.asked = None
            return
        group.started, group.spare = now, False
        if group.state == "asleep":
            group.go("wake")
            group.resting = False
            self.witness.group_changed(group)
            self.ranks.order(group, o.Wake())
            self.loads.group_starting(group)
            self.listener.group_starting(group, now)
        else:
            group.go("admit")
            self.witness.group_changed(group)
            self.ranks.start(group)

    def _ready(self, group: Group, now: float) -> None:
        group.go("ranks_ready")
        group.asked, group.used = None, now
        self.lately.forgive(group.key)
        self.loads.group_ready(self.groups.values(), now)
        self.witness.group_changed(group)
        self.listener.group_ready(group, now)
        self.listener.settle(now)

    def _wanted(self, group: Group) -> bool:
        return self.listener.wanted(group) or self.loads.wants(group.key)

    def _called(self, group: Group) -> bool:
        """Whether somebody waits for one that sleeps."""
        return self.listener.uses(group) or self.loads.wants(group.key)

    def _further(self, group: Group, before: set[Key]) -> bool:
        """Whether all who wait for one that sleeps could go to another that serves, comes, or waits for room `before` it."""
        coming = {one.key for one in self.groups.values() if one.state in ("ready", "starting", "waking")}
        return not self.loads.wants(group.key) and not self.listener.depends(group, coming | before)

    def _ask_for(self, load: Load, now: float) -> None:
        """Has what a load asks for come, or writes down why it cannot."""
        for key in load.keys:
            self.restarts.forgive(key)
            self.lately.forgive(key)
            try:
                self._get(key, load.ref, load.found, now, degraded=load.ladder.degraded)
            except XditError as error:
                load.problems[key] = spell(error.code), error.message

    def _lower(self, load: Load, now: float) -> Sequence[Group] | None:
        """A load can have none of its replicas: it goes on with less, where there is less."""
        code, message = next(iter(load.problems.values()))
        lower = load.ladder.down("start", code, message, load.culprit)
        if lower is None:
            return None
        plan, load.ladder = lower
        load.keys, load.problems, load.culprit = (replace(load.keys[0], plan=plan),), {}, ""
        self._ask_for(load, now)
        self.unsettled = True
        self.witness.degraded(load.ref, load.ladder.degraded, None)
        return list(self.groups.values())

    def _get(
        self,
        key: Key,
        ref: m.ModelRef,
        found: Found,
        now: float,
        *,
        spare: bool = False,
        degraded: str = "",
    ) -> Group:
        """The group for a key: one that serves, one that will, or a new one.

        Raises:
            XditError: `model_failed`, `out_of_memory`.
        """
        present = nearest(self.groups.values(), key)
        if present is not None:
            present.spare = present.spare and spare
            return present
        if self.restarts.exhausted(key, now):
            raise XditError(
                Code.MODEL_FAILED,
                f"{ref.name} failed {self.restarts.limit} times within {self.restarts.window:g} s and is not "
                f"started again by itself; see the log, then load it explicitly.",
            )
        too_large = self.residency.too_large(found, key)
        if too_large:
            raise XditError(Code.OUT_OF_MEMORY, f"{too_large}.")
        group = Group(
            f"g{next(self._names)}", 1, ref, found, key, started=now, used=now, spare=spare, degraded=degraded
        )
        self.groups[group.name] = group  # it waits for room; `admit` starts it
        return group

    def _in_use(self, group: Group) -> bool:
        """Whether it must not be ended. A group whose memory is needed does not live on by who waits for it."""
        if group.name in self.held:
            return self.listener.holds(group)
        return self.listener.uses(group) or (group.state != "ready" and self.loads.wants(group.key))

    def _needed(self, group: Group) -> bool:
        """Whether another is to take its place: somebody waits, or it failed and somebody counts on the replicas."""
        if self.loads.wants(group.key):
            return True
        if group.given_up:  # what made it fail would again: its replicas serve without it
            return self.listener.depends(group)
        if self.listener.uses(group):
            return True
        return bool(group.code) and self.listener.wanted(group)

    def _gone(self, group: Group, now: float) -> None:
        if group.all_gone:  # one that only waited for room was never told of
            self.witness.group_changed(group)
        self.listener.group_gone(group, now)
        self._replace(group, self.restarts.delay(group.key), now)

    def _replace(self, group: Group, delay: float, now: float) -> None:
        """Its ranks are gone: if somebody waits for it, the next generation starts, after `delay` seconds."""
        group.restart_at = None
        if self.closed:
            del self.groups[group.name]
            self._give_up(group, Code.STOPPING, now)
        elif not self._needed(group):
            del self.groups[group.name]
        elif self.restarts.exhausted(group.key, now):
            del self.groups[group.name]
            self._give_up(group, Code.MODEL_FAILED, now)
        elif delay:
            group.restart_at = now + delay
        else:
            del self.groups[group.name]  # behind those that wait for room already
            self.groups[group.name] = group.successor(now)

    def _give_up(self, group: Group, code: Code | str, now: float) -> None:
        group.given_up = True
        message = f"{group.ref.name} could not be served. {group.problem}".rstrip(".") + "."
        self.lately.failed(group.key, spell(code), message, group.culprit, now)
        self.loads.given_up(group, code, message, self.groups.values(), now)
        self.listener.given_up(group, code, message, now)
