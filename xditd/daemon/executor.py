"""Rank processes on this machine: started, watched through pidfds, killed. Knows nothing of what ranks compute.

A rank cannot outlive the daemon: it asks the kernel to be killed with its parent (PR_SET_PDEATHSIG), which is
tied to the thread that spawned it; so ranks are spawned from the main thread, where the event loop runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from xditd.handoff.lane import Lane, pair
from xditd.protocol.orders import RankSpec

log = logging.getLogger("xditd.rank")

OWN = (sys.executable, "-m", "xditd.rank")
"""The rank program of this installation."""


@dataclass(slots=True)
class Process:
    """One rank process. `arena` is the socket on which rank 0 gets segments' descriptors, `lane` the way of its turns."""

    group: str
    rank: int
    popen: subprocess.Popen[bytes]
    pidfd: int
    arena: socket.socket | None
    lane: Lane
    output: int  # descriptor of its stdout and stderr
    rest: bytes = b""  # of a line that has not ended
    ordered: int = 0  # orders that were sent to it by ZeroMQ


Gone = Callable[[str, int, int, str], None]
"""Called with (group, rank, pid, how it ended) once for every process."""

Heard = Callable[[str, int, int, bytes], None]
"""Called with (group, rank, pid, header) for every report that comes by a lane."""


class LocalExecutor:
    """The rank processes of this daemon, by (group, rank)."""

    def __init__(self, gone: Gone, heard: Heard, command: Sequence[str] = OWN) -> None:
        """
        Args:
            command: what a rank is started with.
        """
        self.command = command
        self.gone = gone
        self.heard = heard
        self.processes: dict[tuple[str, int], Process] = {}
        self._loop = asyncio.get_running_loop()

    def spawn(self, spec: RankSpec, environment: Mapping[str, str]) -> Process:
        """Starts one rank. Its standard input carries the spec.

        Raises:
            OSError: no descriptors, processes or memory are left. Nothing of the rank is left either.
        """
        with ExitStack() as theirs, ExitStack() as ours:
            lane, lane_fd = pair()
            ours.callback(lane.close)
            theirs.callback(os.close, lane_fd)
            arena, arena_fd = None, -1
            if spec.rank == 0:
                arena, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(arena.close)
                theirs.callback(other.close)
                arena_fd = other.fileno()
            output, writer = os.pipe()
            ours.callback(os.close, output)
            theirs.callback(os.close, writer)
            os.set_blocking(output, False)
            popen = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=writer,
                stderr=writer,
                pass_fds=[fd for fd in (lane_fd, arena_fd) if fd >= 0],
                env={**os.environ, **environment},
            )
            ours.callback(popen.wait)
            ours.callback(popen.kill)
            spec = msgspec.structs.replace(spec, arena_fd=arena_fd, lane_fd=lane_fd)
            assert popen.stdin is not None
            # Far below a pipe's capacity: it does not block. If the rank is dead already, its pidfd will say so.
            with contextlib.suppress(BrokenPipeError), popen.stdin:
                popen.stdin.write(msgspec.json.encode(spec))
            pidfd = os.pidfd_open(popen.pid)
            ours.callback(os.close, pidfd)
            process = Process(spec.group, spec.rank, popen, pidfd, arena, lane, output)
            watched = ((pidfd, self._ended), (lane.fileno(), self._hear), (output, self._read_output))
            for fd, look in watched:
                self._loop.add_reader(fd, look, process)
                ours.callback(self._loop.remove_reader, fd)
            ours.pop_all()  # they live as long as the process
        self.processes[spec.group, spec.rank] = process
        return process

    def of(self, group: str) -> list[Process]:
        return [process for (name, _), process in self.processes.items() if name == group]

    def kill(self, group: str) -> None:
        """SIGKILL to every rank of the group; `gone` follows for each."""
        for process in self.of(group):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGKILL)

    def reap(self, group: str) -> None:
        """Notices at once those ranks of the group that are dead already."""
        for process in self.of(group):
            if process.popen.poll() is not None:
                self._ended(process)

    def close(self) -> None:
        """Kills and reaps whatever is left."""
        for process in list(self.processes.values()):
            process.popen.kill()
            process.popen.wait()
            self._ended(process)

    def _ended(self, process: Process) -> None:
        if self.processes.pop((process.group, process.rank), None) is None:
            return
        self._loop.remove_reader(process.pidfd)
        os.close(process.pidfd)
        self._read_output(process)
        self._loop.remove_reader(process.output)
        os.close(process.output)
        self._hear(process)
        self._loop.remove_reader(process.lane.fileno())
        process.lane.close()
        if process.arena is not None:
            process.arena.close()
        code = process.popen.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self.gone(process.group, process.rank, process.popen.pid, how)

    def _hear(self, process: Process) -> None:
        """A report has come, or the rank's end of the lane is closed: its pidfd will say why."""
        header = process.lane.receive()
        if header:
            self.heard(process.group, process.rank, process.popen.pid, header)
        elif header is not None:
            self._loop.remove_reader(process.lane.fileno())

    def _read_output(self, process: Process) -> None:
        """A rank's lines become ours, with its name on them."""
        try:
            while chunk := os.read(process.output, 65536):
                *lines, process.rest = (process.rest + chunk).split(b"\n")
                for line in lines:
                    text = line.decode(errors="replace")[:2000]
                    log.info("%s", text, extra={"group": process.group, "rank": process.rank})
        except BlockingIOError:
            return
        self._loop.remove_reader(process.output)  # end of file: it closed its output, or has ended
