"""The door for ranks: starts and kills their processes, sends orders, hands reports to the dispatcher.

Rank 0 is given the descriptors of a client's segments before the first order that names one of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct

from xditd.daemon.arenas import Arena
from xditd.daemon.config import Config
from xditd.daemon.dispatcher import Dispatcher
from xditd.daemon.executor import OWN, LocalExecutor
from xditd.daemon.groups import Group
from xditd.daemon.launch import environment, rank_specs, store
from xditd.daemon.nursery import Nursery
from xditd.daemon.wire import Wire
from xditd.handoff.passing import pass_segment
from xditd.protocol import codec
from xditd.protocol import orders as o
from xditd.protocol.errors import Code, XditError

log = logging.getLogger("xditd.groups")


class Ranks:
    """The rank processes of all groups. `dispatcher` is set by whoever assembles the daemon."""

    dispatcher: Dispatcher

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: Path,
        config: Config,
        arena_of: Callable[[bytes], Arena | None],
        nursery: Nursery | None = None,
    ) -> None:
        """
        Args:
            runtime: a folder of ours alone, for the ranks' socket and rendezvous files.
            arena_of: the shared memory of a client, by its identity.
            nursery: where ranks are forked; closed with this.
        """
        self.runtime = runtime
        self.config = config
        self.arena_of = arena_of
        self.executor = LocalExecutor(
            self._born, self._gone, self._heard, config.debug.rank_command or OWN, nursery
        )
        self._passed: dict[str, set[int]] = {}  # group → segments that its rank 0 has
        self._wire = Wire(context, f"ipc://{runtime}/ranks.sock", self._receive, SNDHWM=0, RCVHWM=0)

    def close(self) -> None:
        self.executor.close()
        self._wire.close()

    def start(self, group: Group) -> None:
        self._passed[group.name] = set()
        for spec in rank_specs(group, self.config, self.runtime):
            try:
                self.executor.spawn(spec, environment(spec))
            except OSError as error:
                # The dispatcher is in the middle of deciding: it hears of it when it is done.
                problem = f"Rank {spec.rank} could not be started: {error.strerror or error}"
                asyncio.get_running_loop().call_soon(self._not_started, group, spec.rank, problem)
                return
        log.info(
            "Starting %s on %s (%s).",
            group.ref.name,
            ", ".join(group.devices),
            group.key.plan.reason,
            extra={"group": group.name, "generation": group.generation},
        )

    def _not_started(self, group: Group, first: int, problem: str) -> None:
        """Fails the group, which kills those of its ranks that did start; from the first that did not, they are gone."""
        self.dispatcher.fleet.fail(group, Code.LOAD_FAILED, problem, time.monotonic())
        for rank in range(first, len(group.ranks)):
            self._rank_gone(group, rank, "was never started")

    def order(
        self, group: Group, order: Struct, *, peer: bytes | None = None, frames: Sequence[Any] = ()
    ) -> None:
        if isinstance(order, o.Leave):
            why = f" {group.problem}." if group.problem else ""
            log.info("%s leaves.%s", group.ref.name, why, extra={"group": group.name})
        try:
            arena = self.arena_of(peer) if peer is not None else None
            if arena is not None:
                self._pass_segments(group, arena)
            header = codec.encode(order)
        except XditError as error:
            # The dispatcher is in the middle of deciding: it hears of it when the processes are gone.
            log.error("%s", error.message, extra={"group": group.name, "code": error.code})
            self.executor.kill(group.name)
            return
        for rank in range(len(group.ranks)):
            process = self.executor.processes.get((group.name, rank))
            if process is None:
                continue  # it is dead, and the dispatcher about to hear of it
            if not frames and process.lane.send(o.AFTER.pack(process.ordered) + header):
                continue
            # A rank that cannot be reached is dead, and its pidfd is about to say so.
            self._wire.send(_identity(group, rank), header, frames if rank == 0 else ())
            process.ordered += 1

    def kill(self, group: Group) -> None:
        if group.code:
            extra = {"group": group.name, "generation": group.generation, "code": group.code}
            log.error("%s failed: %s.", group.ref.name, group.problem.rstrip("."), extra=extra)
        self.executor.kill(group.name)

    def forget_segments(self, segments: Sequence[int]) -> None:
        """Their client is gone: rank 0 was told to drop them."""
        for passed in self._passed.values():
            passed.difference_update(segments)

    def _pass_segments(self, group: Group, arena: Arena) -> None:
        passed = self._passed[group.name]
        if len(passed) >= len(arena.segments) and passed.issuperset(arena.segments):
            return
        process = self.executor.processes.get((group.name, 0))
        if process is None or process.arena is None:
            return  # it is dead, and its pidfd is about to say so
        for segment, nbytes in arena.segments.items():
            if segment not in passed:
                pass_segment(process.arena, segment, arena.fd(segment), nbytes)
                passed.add(segment)

    def _receive(self, identity: bytes, header: bytes, frames: list[zmq.Frame]) -> None:
        name, generation, rank = identity.decode().split(".")
        group = self.dispatcher.fleet.groups.get(name)
        if group is None or group.generation != int(generation):
            return  # a late word of a dead generation
        self._report(group, int(rank), header, frames)

    def _born(self, name: str, generation: int, rank: int, pid: int) -> None:
        group = self.dispatcher.fleet.groups.get(name)
        if group is not None and group.generation == generation:
            group.ranks[rank].pid = pid

    def _heard(self, name: str, generation: int, rank: int, header: bytes) -> None:
        group = self.dispatcher.fleet.groups.get(name)
        if group is not None and group.generation == generation:
            self._report(group, rank, header, ())

    def _report(self, group: Group, rank: int, header: bytes, frames: Sequence[Any]) -> None:
        report = codec.decode(header, o.Report, o.REPORTS, trusted=True)
        now = time.monotonic()
        if isinstance(report, o.TurnDone):
            self.dispatcher.turn_done(group, report, frames, now)
        elif isinstance(report, o.RankPhase):
            self.dispatcher.fleet.rank_phase(group, report, now)
        elif isinstance(report, o.RankRested):
            self.dispatcher.fleet.rank_rested(group, report, now)
            if group.state == ("asleep" if report.asleep else "ready"):
                done = "sleeps in the host's memory" if report.asleep else "is awake again"
                extra = {"group": group.name, "generation": group.generation, "done": True}
                log.info("%s %s after %.1f s.", group.ref.name, done, report.seconds, extra=extra)
        elif isinstance(report, o.RankReady):
            self.dispatcher.fleet.rank_ready(group, report, now)
            if group.state == "ready":
                extra = {"group": group.name, "generation": group.generation, "done": True}
                log.info("%s is ready after %.1f s.", group.ref.name, group.ready_after or 0.0, extra=extra)
        else:
            extra = {"group": group.name, "rank": rank, "code": report.code}
            log.error("%s\n%s", report.message, report.traceback, extra=extra)
            # A rank complains of a peer that died: it is the death that counts.
            self.executor.reap(group.name)
            self.dispatcher.rank_failed(group, report, now)

    def _gone(self, name: str, generation: int, rank: int, pid: int, how: str) -> None:
        group = self.dispatcher.fleet.groups.get(name)
        if group is None or group.generation != generation:
            return
        if group.alive:
            log.error("Rank %d %s.", rank, how, extra={"group": name, "rank": rank, "pid": pid})
        self._rank_gone(group, rank, how)

    def _rank_gone(self, group: Group, rank: int, how: str) -> None:
        """Nothing of a generation is left when its last rank is gone."""
        self.dispatcher.fleet.rank_gone(group, rank, how, time.monotonic())
        if not group.all_gone:
            return
        store(group, self.runtime).unlink(missing_ok=True)
        next_one = self.dispatcher.fleet.groups.get(group.name)
        if next_one is None or next_one is group or next_one.state == "waiting":  # it has not started
            self._passed.pop(group.name, None)


def _identity(group: Group, rank: int) -> bytes:
    return f"{group.name}.{group.generation}.{rank}".encode()
