"""A rank process from its first breath to its exit code. Imports nothing slow: that comes when the daemon knows of it, or
was done before, in the nursery."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback

import msgspec
import zmq

from xditd.handoff.lane import Lane
from xditd.protocol.orders import RankPhase, RankReady, RankSpec
from xditd.rank.faults import Faults
from xditd.rank.loading import load
from xditd.rank.loop import Loop, failed, report
from xditd.rank.places import Places

LINGER = 2000
"""Milliseconds that last reports have to leave the process."""

LAST_WORDS = 5.0
"""Seconds that a rank which failed waits to be killed."""

NAME = "xditd-rank"
"""What `ps` and `top` call a rank, of at most 15 characters."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def main() -> int:
    """Reads the spec from standard input and serves it."""
    begun = time.perf_counter()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSpec)
    if not die_with(spec.parent):
        return 1
    return live(spec, begun)


def live(spec: RankSpec, begun: float) -> int:
    """Serves a spec, and ends the process.

    Args:
        begun: `perf_counter` seconds when its life began.
    """
    go_by(NAME)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the daemon as well, which stops us
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"{spec.group}.{spec.generation}.{spec.rank}".encode())
    socket.setsockopt(zmq.LINGER, LINGER)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(spec.endpoint)
    code = _serve(spec, socket, begun)
    if code:
        # The daemon kills a failed rank when it has read why. Ending before that, we would look like a crash.
        time.sleep(LAST_WORDS)
    socket.close()
    context.term()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: taking a torch.distributed world down waits for peers, which may be gone or never answer.
    os._exit(code)


def _serve(spec: RankSpec, socket: zmq.Socket[bytes], begun: float) -> int:
    def tell(phase: str, loaded: int = 0, total: int = 0) -> None:
        report(
            socket,
            RankPhase(
                group=spec.group,
                generation=spec.generation,
                rank=spec.rank,
                pid=os.getpid(),
                phase=phase,
                loaded=loaded,
                total=total,
            ),
        )

    faults = Faults(spec.options, spec.rank, spec.plan.offload)
    try:
        if spec.family == "echo":
            tell("loading")
        worker = load(spec, Places(spec.arena_fd), faults, tell)
    except Exception as error:  # whatever it is, the daemon is to say it: this process cannot serve
        traceback.print_exc()
        report(socket, failed(spec.rank, error, None, alive=False))
        return 1
    report(
        socket,
        RankReady(
            rank=spec.rank,
            seconds=time.perf_counter() - begun,
            device_memory=worker.device_memory(),
            attention=worker.attention,
            weights=worker.weights,
            host_weights=worker.host_weights,
        ),
    )
    lane = Lane(spec.lane_fd) if spec.lane_fd >= 0 else None
    return Loop(socket, lane, spec, worker, faults).serve()


def go_by(name: str) -> None:
    """Has the kernel call this process so."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def die_with(parent: int) -> bool:
    """Has the kernel kill this process with its parent, also when it is stuck in C. False: the parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent  # it may have died before we asked
