"""Imports once for all tests: a process that has done them forks ranks, and nurseries for daemons.

`python -m tests.warm` is the product's nursery with another door. A rank of it is the rank that `xditd.rank.nursery` forks. A
daemon is a fork that forks a nursery of its own and then becomes `python -m xditd.daemon`: a fresh program, which finds
its child there and warm (`debug.nursery`). Both are this process's children, which tells pytest their exit codes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from xditd.protocol.births import PID, Birth, Warm
from xditd.protocol.orders import RankSpec

ROOT = Path(__file__).parents[1]
MAX_REQUEST = 1 << 18
CODE = struct.Struct("=i")


class Forked:
    """A process that the warm one forked, as a Popen.

    Args:
        pid: of it.
        ended: the pipe on which its exit code comes.
    """

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._ended, select.POLLIN)
            if poll.poll(None if timeout is None else timeout * 1000):
                (self.returncode,) = CODE.unpack(os.read(self._ended, CODE.size))
                os.close(self._ended)
        return self.returncode


class Warmth:
    """The warm process, for pytest."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        # It is told before it is asked again, and ends with pytest.
        assert self._sock.recv(1), "the warm process could not import"

    def daemon(self, arguments: Sequence[str], output: int, environment: Mapping[str, str]) -> Forked:
        """`python -m xditd.daemon` with these arguments, and a warm nursery."""
        return self._ask({"daemon": list(arguments), "environment": dict(environment)}, [output])

    def rank(self, spec: RankSpec, output: int, arena: int) -> Forked:
        """A rank, which dies with the warm process where its spec says that it is to die with pytest."""
        if spec.parent == os.getpid():
            spec = msgspec.structs.replace(spec, parent=self.process.pid)
        fds = [output] if arena < 0 else [output, arena]
        return self._ask({"rank": json.loads(msgspec.json.encode(spec))}, fds)

    def _ask(self, request: Any, fds: Sequence[int]) -> Forked:
        ended, tell = os.pipe()
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], [tell, *fds])
        finally:
            os.close(tell)
        return Forked(PID.unpack(self._sock.recv(PID.size))[0], ended)


@functools.cache
def warmth() -> Warmth:
    """One for the session, from when it is first asked for."""
    return Warmth()


def main() -> None:
    from xditd.rank import nursery
    from xditd.rank.main import die_with
    from xditd.rank.preload import preload

    sock = socket.socket(fileno=int(sys.argv[1]))
    assert die_with(int(sys.argv[2]))
    assert preload("cpu") == ""
    nursery.settle()
    noticed, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.set_wakeup_fd(notice)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    sock.send(b"!")
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(noticed, select.POLLIN)
    children: dict[int, int] = {}
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if noticed in ready:
            os.read(noticed, 4096)
            tell_ends(children)
        if sock.fileno() in ready:
            record, fds, *_ = socket.recv_fds(sock, MAX_REQUEST, 3)
            if not record:
                os._exit(0)
            tell, *fds = fds
            pid = os.fork()
            if not pid:
                live(json.loads(record), fds)
            children[pid] = tell
            for fd in fds:
                os.close(fd)
            sock.send(PID.pack(pid))


def tell_ends(children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        tell = children.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # nobody wants to know
            os.write(tell, CODE.pack(os.waitstatus_to_exitcode(status)))
        os.close(tell)


def live(request: Any, fds: list[int]) -> None:
    """The fork: it never returns."""
    from xditd.rank import nursery

    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "rank" in request:
            keep(fds)
            birth = Birth(spec=msgspec.convert(request["rank"], RankSpec), environment={})
            output, *arena = fds
            nothing = os.open(os.devnull, os.O_WRONLY)
            os._exit(nursery._begin(birth, nothing, output, -1, *arena))
        become_daemon(request["daemon"], request["environment"], fds[0])
    finally:
        os._exit(1)


def become_daemon(arguments: list[str], environment: dict[str, str], output: int) -> None:
    from xditd.rank import nursery
    from xditd.rank.main import die_with, go_by

    daemon = os.getpid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.environ.clear()
    os.environ.update(environment)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nest = os.fork()
    if not nest:
        keep([theirs.fileno()])
        go_by(nursery.NAME)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if die_with(daemon):
            theirs.send(msgspec.json.encode(Warm(seconds=0.0)))
            nursery.serve(theirs)
        os._exit(0)
    keep([ours.fileno()])
    ours.set_inheritable(True)
    own = f"--set=debug.nursery=[{ours.fileno()}, {nest}]"
    os.execve(sys.executable, [sys.executable, "-m", "xditd.daemon", *arguments, own], environment)


def keep(fds: Sequence[int]) -> None:
    """Closes everything else, but for the standard streams."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in fds:
            with contextlib.suppress(OSError):  # of the listing itself
                os.close(int(name))


if __name__ == "__main__":
    main()
