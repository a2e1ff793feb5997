"""The daemon's end of its nursery: a process that has imported what ranks import, and forks them.

It saves ranks their imports and nothing depends on it. While it imports, ranks that are asked for wait for it: it is ahead
of whoever would begin now. When it has ended, or does not answer, ranks are started as programs of their own. A rank
that it forked is the daemon's own child, see docs/decisions/0015-a-nursery-forks-the-ranks.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import msgspec

from xditd.daemon.child import Child, adopt_orphans, how_it_ended
from xditd.daemon.lines import Lines
from xditd.protocol.births import Birth, Warm
from xditd.protocol.figures import NurseryStatus
from xditd.protocol.orders import RankSpec

log = logging.getLogger("xditd.nursery")

IMPORTS = 180.0
"""Seconds that it has to import, from a disk that has nothing cached."""

BIRTH = 20.0
"""Seconds that a warm one has to fork a rank: it takes a few hundredths of one."""

CONSEQUENCE = "Ranks import for themselves from now on, which takes each some seconds more."


class Nursery:
    """One for the daemon's life. Without `start` it takes nobody.

    Attributes:
        state: "off", "importing", "warm", "ended".
        problem: why it has ended, a sentence.
    """

    def __init__(self) -> None:
        self.state = "off"
        self.problem = ""
        self.seconds: float | None = None
        self.child: Child | None = None
        self._lines: Lines | None = None
        self._sock: socket.socket | None = None
        self._until = 0.0  # monotonic: when it is to be warm
        self._loop = asyncio.get_running_loop()

    def start(self, device: str) -> None:
        """Starts the process; where that cannot be, it has ended.

        Args:
            device: what ranks run on, "cpu" or "cuda".
        """
        try:
            self._start(device)
        except OSError as error:
            self.state, self.problem = "ended", f"It could not be started: {error.strerror or error}"
            log.warning("There is no nursery: %s. %s", self.problem, CONSEQUENCE)

    def _start(self, device: str) -> None:
        with ExitStack() as own:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            own.callback(ours.close)
            with theirs:
                lines = Lines({})
                own.callback(lines.close)
                fd = theirs.fileno()
                try:
                    popen = subprocess.Popen(
                        [sys.executable, "-m", "xditd.rank.nursery", str(fd), str(os.getpid()), device],
                        stdin=subprocess.DEVNULL,
                        stdout=lines.writer,
                        stderr=lines.writer,
                        pass_fds=[fd],
                        env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONUNBUFFERED": "1"},
                    )
                finally:
                    os.close(lines.writer)
            child = Child(popen.pid, popen)
            own.pop_all()
        self._lines = lines
        self._take(ours, child)

    def inherit(self, fd: int, pid: int) -> None:
        """Takes one that was forked before this process became the daemon, as tests do.

        Args:
            fd: of the socket to it.
            pid: of this child.
        """
        os.set_inheritable(fd, False)
        self._take(socket.socket(fileno=fd), Child(pid))

    def _take(self, sock: socket.socket, child: Child) -> None:
        adopt_orphans()  # before it forks a rank
        self._sock, self.child = sock, child
        sock.setblocking(False)
        self.state = "importing"
        self._until = time.monotonic() + IMPORTS
        self._loop.add_reader(sock, self._hear)

    @property
    def patience(self) -> float:
        """Seconds after which a rank that was asked for now is not waited for any longer."""
        return BIRTH if self.state == "warm" else max(0.0, self._until - time.monotonic()) + BIRTH

    def ask(self, spec: RankSpec, environment: Mapping[str, str], fds: Sequence[int]) -> int | None:
        """Asks for a rank.

        Args:
            environment: variables beyond the daemon's own.
            fds: the rank's: output, lane and, of rank 0, arena. They stay the caller's.

        Returns:
            A pipe, the caller's: on it the rank tells its pid (`births.PID`), as a child of this process. Its end without
            that says that there is no such rank and will not be. None: it takes nobody.

        Raises:
            OSError: no descriptors are left.
        """
        if self._sock is None or self.state not in ("importing", "warm"):
            return None
        told, tell = os.pipe()
        birth = msgspec.json.encode(Birth(spec=spec, environment=dict(environment)))
        try:
            socket.send_fds(self._sock, [birth], [tell, *fds])
        except OSError as error:  # it is about to be heard of, or has more to do than it can
            log.warning("The nursery takes no further rank: %s.", error.strerror)
            os.close(told)
            return None
        finally:
            os.close(tell)
        return told

    def give_up(self, problem: str) -> None:
        """Has it end: it does not do what it is for. All pipes of ranks that are not born end with it."""
        if self.child is not None:
            self.problem = self.problem or problem
            self.state = (
                "ended"  # it takes nobody from now on, also where it hangs in the kernel and dies later
            )
            self.child.kill()

    def status(self) -> NurseryStatus:
        return NurseryStatus(
            state=self.state,
            pid=self.child.pid if self.child is not None else 0,
            seconds=self.seconds,
            problem=self.problem,
        )

    def close(self) -> None:
        """Ends it. Ranks that it forked live on."""
        if self._sock is not None:
            self._end()

    def _hear(self) -> None:
        assert self._sock is not None
        try:
            record = self._sock.recv(4096)
        except BlockingIOError:
            return
        except ConnectionError:
            record = b""
        if record:
            self._warm(msgspec.json.decode(record, type=Warm))
            return
        how = how_it_ended(self._end())
        self.problem = self.problem or f"It {how}"
        log.warning("The nursery has ended: %s. %s", self.problem, CONSEQUENCE, extra={"pid": self._pid})

    @property
    def _pid(self) -> int:
        return self.child.pid if self.child is not None else 0

    def _warm(self, warm: Warm) -> None:
        self.state, self.seconds = "warm", warm.seconds
        but = (
            f", but for {' and '.join(warm.left_out)}, which they import themselves" if warm.left_out else ""
        )
        log.info("Ranks are forked from now on, with their imports done%s.", but, extra={"pid": self._pid})

    def _end(self) -> int:
        assert self._sock is not None
        assert self.child is not None
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._sock = None
        self.state = "ended"
        self.child.kill()  # its socket's end is an end, whatever else it does
        code = self.child.wait()
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        self.child.close()
        return code
