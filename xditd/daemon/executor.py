"""Rank processes on this machine: started, watched through pidfds, killed. Knows nothing of what ranks compute.

A rank is forked by the nursery where there is one, else it is a program that is started. Either way it is a child of the
daemon and cannot outlive it: it asks the kernel to be killed with its parent (PR_SET_PDEATHSIG), which is tied to a
thread; so programs are started from the main thread, where the event loop runs, and orphans come to it as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from xditd.daemon.child import Child, how_it_ended, reap_strays
from xditd.daemon.lines import Lines
from xditd.daemon.nursery import Nursery
from xditd.handoff.lane import Lane, pair
from xditd.protocol.births import PID
from xditd.protocol.orders import RankSpec

log = logging.getLogger("xditd.rank")

OWN = (sys.executable, "-m", "xditd.rank")
"""The rank program of this installation."""


@dataclass(slots=True)
class Birth:
    """What a rank is to be given, kept until it has it."""

    spec: RankSpec
    environment: Mapping[str, str]
    output: int
    lane: int
    arena: int  # -1: it is not rank 0
    given: ExitStack  # closes these descriptors
    told: int = -1  # the pipe on which a rank of the nursery's tells its pid
    late: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Process:
    """One rank process. `arena` is the socket on which rank 0 gets segments' descriptors, `lane` the way of its turns."""

    group: str
    generation: int
    rank: int
    arena: socket.socket | None
    lane: Lane
    lines: Lines
    birth: Birth | None  # until it is born
    child: Child | None = None  # from then on
    own: ExitStack = field(default_factory=ExitStack)  # closes what the daemon has of it
    ordered: int = 0  # orders that were sent to it by ZeroMQ

    @property
    def pid(self) -> int:
        """0 before it is born."""
        return 0 if self.child is None else self.child.pid


Born = Callable[[str, int, int, int], None]
"""Called with (group, generation, rank, pid) once for every process that there is."""

Gone = Callable[[str, int, int, int, str], None]
"""Called with (group, generation, rank, pid, how it ended) once for every process; one that never was has the pid 0."""

Heard = Callable[[str, int, int, bytes], None]
"""Called with (group, generation, rank, header) for every report that comes by a lane."""


class LocalExecutor:
    """The rank processes of this daemon, by (group, rank)."""

    def __init__(
        self,
        born: Born,
        gone: Gone,
        heard: Heard,
        command: Sequence[str] = OWN,
        nursery: Nursery | None = None,
    ) -> None:
        """
        Args:
            command: what a rank is started with that is not forked.
            nursery: where ranks are forked; None: nowhere.
        """
        self.command = command
        self.nursery = nursery
        self.born = born
        self.gone = gone
        self.heard = heard
        self.processes: dict[tuple[str, int], Process] = {}
        self._loop = asyncio.get_running_loop()

    def spawn(self, spec: RankSpec, environment: Mapping[str, str]) -> Process:
        """Starts one rank; one that the nursery forks is born a moment later.

        Raises:
            OSError: no descriptors, processes or memory are left. Nothing of the rank is left either.
        """
        with ExitStack() as own:
            given = own.enter_context(ExitStack())
            lines = Lines({"group": spec.group, "rank": spec.rank})
            own.callback(lines.close)
            given.callback(os.close, lines.writer)
            lane, lane_fd = pair()
            own.callback(lane.close)
            given.callback(os.close, lane_fd)
            arena, arena_fd = None, -1
            if spec.rank == 0:
                arena, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                own.callback(arena.close)
                arena_fd = other.detach()
                given.callback(os.close, arena_fd)
            birth = Birth(spec, environment, lines.writer, lane_fd, arena_fd, given)
            process = Process(spec.group, spec.generation, spec.rank, arena, lane, lines, birth)
            own.callback(self._loop.remove_reader, lane.fileno())
            self._loop.add_reader(lane.fileno(), self._hear, process)
            process.own = own
            if not self._ask(process, birth):
                self._start(process, birth)
            process.own = own.pop_all()
        self.processes[spec.group, spec.rank] = process
        return process

    def of(self, group: str) -> list[Process]:
        return [process for (name, _), process in self.processes.items() if name == group]

    def kill(self, group: str) -> None:
        """SIGKILL to every rank of the group; `gone` follows for each."""
        for process in self.of(group):
            if process.child is not None:
                process.child.kill()
            else:
                self._forget(process, "was killed before it was born")

    def reap(self, group: str) -> None:
        """Notices at once those ranks of the group that are dead already."""
        for process in self.of(group):
            if process.child is not None and process.child.poll() is not None:
                self._ended(process)

    def reap_strays(self) -> None:
        """Reaps what ranks that ended have left. Not while one is to be born: it may have ended already, and be told of next."""
        if any(process.child is None for process in self.processes.values()):
            return
        known = {process.pid for process in self.processes.values()}
        nursery = self.nursery.child if self.nursery is not None else None
        reap_strays(known | ({nursery.pid} if nursery is not None else set()))

    def close(self) -> None:
        """Kills and reaps whatever is left."""
        for process in list(self.processes.values()):
            if process.child is None:
                self._forget(process, "was killed before it was born")
            else:
                process.child.kill()
                self._ended(process)
        if self.nursery is not None:
            self.nursery.close()

    # ------------------------------------------------------------------------------------------- its birth

    def _ask(self, process: Process, birth: Birth) -> bool:
        """Asks the nursery for a rank; False where there is none, or no need: a rank without a model imports nothing."""
        if self.nursery is None or birth.spec.family == "echo":
            return False
        fds = [fd for fd in (birth.output, birth.lane, birth.arena) if fd >= 0]
        told = self.nursery.ask(birth.spec, birth.environment, fds)
        if told is None:
            return False
        birth.told = told
        birth.given.callback(os.close, told)
        birth.given.callback(self._loop.remove_reader, told)
        self._loop.add_reader(told, self._hear_of, process, birth)
        problem = "It did not fork a rank in time"
        birth.late = self._loop.call_later(self.nursery.patience, self.nursery.give_up, problem)
        birth.given.callback(birth.late.cancel)
        return True

    def _hear_of(self, process: Process, birth: Birth) -> None:
        """A rank of the nursery's is born, or will not be."""
        told = os.read(birth.told, PID.size)
        try:
            if told:
                self._born(process, Child(PID.unpack(told)[0]))
            else:
                facts = {"group": process.group, "rank": process.rank}
                log.warning("The nursery did not fork this rank: it is started as a program.", extra=facts)
                self._start(process, birth)
        except OSError as error:
            self._forget(process, f"could not be started: {error.strerror or error}")

    def _start(self, process: Process, birth: Birth) -> None:
        """Starts a rank as a program. Its standard input carries the spec."""
        popen = subprocess.Popen(
            list(self.command),
            stdin=subprocess.PIPE,
            stdout=birth.output,
            stderr=birth.output,
            pass_fds=[fd for fd in (birth.lane, birth.arena) if fd >= 0],
            env={**os.environ, **birth.environment},
        )
        assert popen.stdin is not None
        try:
            child = Child(popen.pid, popen)
        except OSError:
            popen.stdin.close()
            raise
        spec = msgspec.structs.replace(birth.spec, arena_fd=birth.arena, lane_fd=birth.lane)
        # Far below a pipe's capacity: it does not block. If the rank is dead already, its pidfd will say so.
        with contextlib.suppress(BrokenPipeError), popen.stdin:
            popen.stdin.write(msgspec.json.encode(spec))
        self._born(process, child)

    def _born(self, process: Process, child: Child) -> None:
        """From now on it lives, and has what it is to have."""
        process.own.callback(child.close)
        process.own.callback(child.wait)
        process.own.callback(child.kill)
        process.own.callback(self._loop.remove_reader, child.fd)
        self._loop.add_reader(child.fd, self._ended, process)
        process.child = child
        if process.birth is not None:
            process.birth.given.close()
            process.birth = None
        self.born(process.group, process.generation, process.rank, child.pid)

    # --------------------------------------------------------------------------------------------- its end

    def _forget(self, process: Process, how: str) -> None:
        """One that was never born. Whoever forgets it is in the middle of deciding: it hears of it when it is done."""
        del self.processes[process.group, process.rank]
        if process.birth is not None:
            process.birth.given.close()  # with the pipe: if the nursery has just forked it, it ends by that
        process.own.close()
        self._loop.call_soon(self.gone, process.group, process.generation, process.rank, 0, how)

    def _ended(self, process: Process) -> None:
        if self.processes.pop((process.group, process.rank), None) is None:
            return
        assert process.child is not None
        code = process.child.wait()
        process.lines.read()
        self._hear(process)
        process.own.close()
        self.gone(process.group, process.generation, process.rank, process.pid, how_it_ended(code))

    def _hear(self, process: Process) -> None:
        """A report has come, or the rank's end of the lane is closed: its pidfd will say why."""
        header = process.lane.receive()
        if header:
            self.heard(process.group, process.generation, process.rank, header)
        elif header is not None:
            self._loop.remove_reader(process.lane.fileno())
