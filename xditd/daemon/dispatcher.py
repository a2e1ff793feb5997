"""Which run is on which group, and what becomes of a run. Decides; does nothing itself.

What happens in the world comes in as a method call with the time; what should happen goes out through two ports, and a
witness hears what did (`ports`). No socket, clock, process or device is in here, so its tests need none. The way of a run:

    open → queued → its group is ready → `RunOpened` → ask → turns → the answer → ask → … → close

Who there is stands in the `roster`; which of those that wait gets a place, and where, is `placing`'s; what a run with a
place is asked is done by `jobs`, and what becomes of it when it cannot go on by `ends`; groups come and go in the `fleet`;
what clients hear of waiting is in the `tidings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from itertools import count
from typing import Any

from xditd.catalog.catalog import Found, FoundLora
from xditd.daemon import states
from xditd.daemon.deadlines import Deadlines
from xditd.daemon.departures import Departures
from xditd.daemon.descent import Descent
from xditd.daemon.ends import Ends
from xditd.daemon.fallback import Ladder
from xditd.daemon.fleet import LOST, Fleet
from xditd.daemon.groups import Group, Restarts
from xditd.daemon.jobs import Jobs
from xditd.daemon.placing import Placing
from xditd.daemon.ports import ClientPort, RankPort, Witness
from xditd.daemon.residency import Residency
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Key, Run, Work
from xditd.daemon.tidings import Tidings
from xditd.daemon.turns import Turns
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code, XditError


class Dispatcher:
    """The runs of a daemon, and its fleet of groups."""

    def __init__(
        self,
        clients: ClientPort,
        ranks: RankPort,
        witness: Witness,
        deadlines: Deadlines,
        restarts: Restarts,
        residency: Residency,
        *,
        queue: int = 256,
        places: int = 32,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            queue: runs that may wait at once.
            places: runs that one group takes at once.
            weights: of devices, for `weighted_round_robin`.
        """
        self.clients = clients
        self.ranks = ranks
        self.witness = witness
        self.deadlines = deadlines
        self.queue = queue
        self.placing = Placing(places, weights or {})
        self.fleet = Fleet(clients, ranks, witness, deadlines, restarts, residency, self)
        self.departures = Departures(clients, self.fleet)
        self.turns = Turns()
        self.runs = Roster()
        experience = self.placing.experience
        self.tidings = Tidings(clients, self.runs, self.fleet.groups, self.turns, experience, places)
        self.jobs = Jobs(clients, ranks, witness, self.runs, self.fleet.groups, self.turns)
        self.descent = Descent(witness, self.fleet, self.runs)
        self.ends = Ends(clients, ranks, witness, self.fleet, self.runs, self.turns, self.descent, experience)
        self.draining = False
        self._ids = count(1)
        self._settling = False

    # -------------------------------------------------------------------------------------- from clients

    def open(
        self,
        peer: bytes,
        client: str,
        request: m.OpenRun,
        found: Found,
        keys: tuple[Key, ...],
        now: float,
        loras: Sequence[FoundLora] = (),
        ladder: Ladder | None = None,
    ) -> Run:
        """Queues a run. `RunOpened` follows when a group is ready for it.

        Args:
            keys: of the replicas, any of which may take it.
            ladder: what it may be done with where they cannot be had.
            loras: that it asks for, found to fit the model.

        Raises:
            XditError: `draining`, `queue_full`, `model_failed`, `out_of_memory`.
        """
        self.refuse_if_draining()
        if len(self.runs.queued) >= self.queue:
            raise XditError(Code.QUEUE_FULL, f"{self.queue} runs are waiting already; try again later.")
        run = Run.asked_for(request, next(self._ids), peer, client, found, keys, now, loras, ladder)
        self.descent.seat(run, now)
        self.runs.add(run)
        self.witness.run_opened(run)
        if run.ladder.degraded:  # already
            self.witness.degraded(run.ref, run.ladder.degraded, run)
        self.settle(now)
        self.tidings.waiting([run], now)
        return run

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise XditError(Code.DRAINING, "The daemon takes nothing new: it is being drained for a stop.")

    def put(self, run: Run, message: m.PutConditioning, frames: Sequence[Any], now: float) -> None:
        """Keeps a conditioning, and passes it on if the run has a group; answered at once."""
        run.touched = now
        run.conditioning[message.key] = (message, frames)
        if run.group:
            self._pass_conditioning(run, message, frames)
        self.clients.answer(run.peer, m.ConditioningPut(re=message.id, run=run.id, key=message.key))

    def ask(self, run: Run, work: Work, frames: Sequence[Any], now: float) -> None:
        """A request that needs turns.

        Raises:
            XditError: `run_busy` if one is under way.
        """
        self.jobs.ask(run, work, frames, now)
        if run.untold and run.group:
            self.tidings.rebound(run, work.id)

    def stop(self, run: Run, message: str, now: float) -> None:
        """Ends a run: now, or with the turn that it is in. Then whoever waits for it (`Run.due`) is answered."""
        self.ends.stop(run, message, now)
        self.settle(now)

    def unload(self, groups: list[Group], force: bool, now: float) -> None:
        """Tells groups to leave.

        Raises:
            XditError: `group_busy` without `force` where runs are on one, or wait for it.
        """
        for group in groups:
            runs = [run.id for run in (*self.runs.on(group), *self.runs.waiting_for(group.key))]
            if runs and not force:
                raise XditError(
                    Code.GROUP_BUSY,
                    f"Group {group.name} has open runs ({', '.join(map(str, runs))}); "
                    f"wait for them, cancel them, or unload by force.",
                    runs=runs,
                )
        for group in groups:
            for run in (*self.runs.on(group), *self._hopeless(group, *groups)):
                self.ends.stop(run, f"Group {group.name} was unloaded by force.", now)
            self.fleet.leave(group, now)  # behind the turn that it may be in
        self.settle(now)

    def sleep(self, groups: list[Group], now: float) -> None:
        """Tells groups to sleep.

        Raises:
            XditError: `group_busy` where a run uses one, or it is not ready; `out_of_memory` where the host has no room.
        """
        awake = [group for group in groups if group.state not in ("dozing", "asleep")]
        everybody = self.fleet.groups.values()
        for number, group in enumerate(awake):
            if self.uses(group) or group.state != "ready":
                raise XditError(
                    Code.GROUP_BUSY,
                    f"Group {group.name} is in use or not ready; wait for its runs or cancel them.",
                )
            if not self.fleet.residency.room_to_sleep(group, everybody, awake[:number]):
                raise XditError(
                    Code.OUT_OF_MEMORY,
                    f"The host's memory has no room for {group.ref.name} to sleep in; unload it instead.",
                )
        for group in awake:
            self.fleet.sleep(group, now)

    def client_gone(self, peer: bytes, segments: tuple[int, ...], now: float) -> None:
        """A client's connection ended: its runs end, the ranks drop its segments."""
        for run in self.runs.of(peer):
            self.ends.stop(run, "Its client is gone.", now)
        self.fleet.loads.forget_peer(peer)
        self.turns.forget_client(peer)
        if segments:
            for group in self.fleet.groups.values():
                if group.state in states.GROUP_LOADED:  # in line after any turn that still uses them
                    self.ranks.order(group, o.DropSegments(segments=segments))
        self.settle(now)

    def drain(self, then: Callable[[], None]) -> None:
        """Takes nothing new from now on; `then` is called as soon as no run is left."""
        self.draining = True
        self.ends.drain(then)

    def close(self, now: float) -> None:
        """The daemon stops: every run ends, every group leaves."""
        self.draining = True
        for run in list(self.runs.values()):
            self.ends.stop(run, "The daemon is stopping.", now)
        self.fleet.close(now)
        self.settle(now)

    # ---------------------------------------------------------------------------------------- from ranks

    def turn_done(self, group: Group, report: o.TurnDone, frames: Sequence[Any], now: float) -> None:
        """Rank 0 has finished a turn. A late report of a dead turn changes nothing."""
        run = self.jobs.turn_over(group, report.order, now)
        if run is not None and run.asked is not None:
            group.turns += 1
            group.ranks[0].device_memory = report.device_memory or group.ranks[0].device_memory
            if group.turns > 1:  # the first may have compiled
                self.placing.experience.turn(group.key, report.seconds, run.effort)
            if not self.ends.left(run, now):
                self.jobs.advance(run, run.asked, report, frames, now)
        self._after_turn(now)

    def rank_failed(self, group: Group, report: o.RankFailed, now: float) -> None:
        """A rank raised. If it serves on, only the request failed; else the group has."""
        if not report.alive or report.order is None:
            problem = f"Rank {report.rank}: {report.message}"
            group.culprit = group.ranks[report.rank].device
            own = self._blame(group, report, now)
            code = Code.RANK_LOST if own else report.code
            self.fleet.fail(group, code, problem, now, group.culprit, strike=not own)
        else:
            run = self.jobs.turn_over(group, report.order, now)
            if run is None or run.asked is None or self.ends.left(run, now):
                pass
            elif not self.ends.lower(run, group, report.code, report.message, now):
                self.jobs.refuse(run, run.asked, report.code, report.message, now)
        self._after_turn(now)

    # ------------------------------------------------------------------------------------ from the clock

    def tick(self, now: float) -> None:
        """Deadlines: of groups and turns, and of runs that are asked nothing."""
        self.fleet.tick(now)
        idle, queued = self.deadlines.run_idle, self.deadlines.queued
        for run in list(self.runs.values()):
            if run.state == "bound" and now - run.touched > idle:
                message = (
                    f"Run {run.id} was asked nothing for {idle:g} s (deadlines.run_idle); open a new one."
                )
                self.ends.end(run, Code.RUN_IDLE, message, now)
            elif run.state == "queued" and not run.announced and now - run.opened > queued:
                message = f"Run {run.id} has waited for {queued:g} s (deadlines.queued); try again later."
                self.ends.end(run, Code.DEADLINE_EXCEEDED, message, now)
        self.settle(now)
        self.tidings.tick(now)

    # ------------------------------------------------------------------------------------ from the fleet

    def wanted(self, group: Group) -> bool:
        return any(group.key in run.keys for run in self.runs.values())

    def depends(self, group: Group, others: Set[Key] | None = None) -> bool:
        if others is None:
            return bool(self._hopeless(group))
        return any(others.isdisjoint(run.keys) for run in self.runs.waiting_for(group.key))

    def uses(self, group: Group) -> bool:
        return self.holds(group) or bool(self.runs.waiting_for(group.key))

    def holds(self, group: Group) -> bool:
        return self.runs.count_on(group) > 0

    def lora_bytes(self, group: Group, now: float) -> int:
        return self.placing.lora_bytes(self.runs, group, self.fleet.groups.values(), now)

    def group_starting(self, group: Group, now: float) -> None:
        self.tidings.waiting(self.runs.waiting_for(group.key), now)

    def group_ready(self, group: Group, now: float) -> None:
        if not group.slept:
            self.placing.experience.load(group.key, group.ready_after or 0.0)

    def group_asleep(self, group: Group, now: float) -> None:
        self.departures.look()

    def group_failed(self, group: Group, now: float) -> None:
        """Takes its runs back into the queue; another replica may take them at once.

        What raised in a rank is refused, since it would raise again; what a rank died or hung over is asked
        again of the next group.
        """
        lost = group.code in LOST
        victim = self.jobs.turn_over(group, group.turn, now)
        for run in self.runs.on(group):
            self.turns.forget(run.id)
            if self.ends.left(run, now):
                continue
            if run is victim and run.asked is not None and not lost:
                if self.ends.lower(run, group, group.code, group.problem, now):
                    continue
                self.jobs.refuse(run, run.asked, group.code, group.problem, now)
            self.ends.take_back(run, group, lost, now)

    def group_gone(self, group: Group, now: float) -> None:
        self.jobs.turn_over(group, group.turn, now)
        for run in self.runs.on(group):
            self.ends.end(run, Code.RUN_CANCELLED, run.leaving or group.problem, now)
        self.turns.forget_group(group.name)
        self.departures.look()

    def given_up(self, group: Group, code: Code | str, message: str, now: float) -> None:
        for run in self._hopeless(group):
            self.ends.descend(run, "start", code, message, group, now)

    def no_room_for_loras(
        self, group: Group, alike: Sequence[Group], loras: int, message: str, now: float
    ) -> None:
        for run in self._hopeless(group, *alike):
            if run.lora_bytes >= loras:
                self.ends.descend(run, "start", Code.OUT_OF_MEMORY, message, group, now)

    def settle(self, now: float) -> None:
        """Starts what has room, binds runs for which there is a place, gives turns."""
        if self._settling:  # whoever is at it looks again
            return
        self._settling = self.fleet.unsettled = True
        try:
            while self.fleet.unsettled:
                self.fleet.unsettled = False
                self.fleet.admit(now)
                self._place(now)
            self.jobs.next_turns(now)
        finally:
            self._settling = False

    # -------------------------------------------------------------------------------------- runs, inside

    def _hopeless(self, group: Group, *besides: Group) -> list[Run]:
        """Runs that wait for this group and could go to no other, but for those `besides`."""
        others = {one.key for one in self.fleet.groups.values() if one not in (group, *besides)}
        return [run for run in self.runs.waiting_for(group.key) if others.isdisjoint(run.keys)]

    def _place(self, now: float) -> None:
        """Binds queued runs for which a group is ready that has a place."""
        groups = self.fleet.groups.values()
        serving = [group for group in groups if group.state == "ready" and group.name not in self.fleet.held]
        while (found := self.placing.next(self.runs, serving, now)) is not None:
            self._bind(*found, now)

    def _bind(self, run: Run, group: Group, now: float) -> None:
        self.runs.place(run, group)
        run.touched = run.placed = group.used = now
        if run.loras or group.loras:
            self.ranks.order(group, o.SetLoras(run=run.id, loras=run.loras))
        group.loras, group.lora_bytes = run.loras, run.lora_bytes
        for message, frames in run.conditioning.values():
            self._pass_conditioning(run, message, frames)
        first = not run.announced
        if first:
            run.announced = True
            self.tidings.opened(run, group)
        if run.asked is not None:
            if not first:
                self.tidings.rebound(run, run.asked.work.id)
            self.jobs.begin_anew(run)

    def _blame(self, group: Group, report: o.RankFailed, now: float) -> bool:
        """Whether it failed of an order of one run's own, as every group would: that run ends, or goes on with less."""
        if report.order is not None or report.run is None or report.code in LOST:
            return False
        run = self.runs.get(report.run)
        there = run is not None and self.fleet.groups.get(run.group) is group
        if run is not None and there and not self.ends.left(run, now):
            self.turns.forget(run.id)
            if run.asked is None or not self.ends.lower(run, group, report.code, report.message, now):
                self.ends.end(run, report.code, report.message, now)
        return True

    def _after_turn(self, now: float) -> None:
        """The devices are free; where a run ended with the turn, its place is too."""
        self.jobs.next_turns(now)
        if self.fleet.unsettled:
            self.settle(now)

    def _pass_conditioning(self, run: Run, message: m.PutConditioning, frames: Sequence[Any]) -> None:
        order = o.SetConditioning(run=run.id, key=message.key, tensors=message.tensors, values=message.values)
        self.ranks.order(self.fleet.groups[run.group], order, peer=run.peer, frames=frames)
