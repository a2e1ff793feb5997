"""The nursery: a process that has imported what ranks import (`preload`), and forks them. `python -m xditd.rank.nursery`.

It does nothing else: it has one thread, no device and no model, and whatever it holds is shared by the ranks until they
write to it. A rank is forked twice: its parent between ends at once, and the kernel gives it to the daemon, which asked to
be given orphans; so it is the daemon's child as any other rank is, and the nursery's end is not its own.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
import traceback

import msgspec

from xditd.handoff.passing import receive_fds
from xditd.protocol.births import MAX_BIRTH, MAX_FDS, PID, Birth, Warm
from xditd.rank.main import die_with, go_by, live
from xditd.rank.preload import preload

NAME = "xditd-nursery"


def main() -> int:
    """Arguments: the descriptor of the socket to the daemon, the daemon's pid, the kind of device, what to leave out."""
    begun = time.perf_counter()
    fd, parent, device, *left_out = sys.argv[1:]
    if not die_with(int(parent)):
        return 1
    go_by(NAME)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the daemon as well, which stops us
    daemon = socket.socket(fileno=int(fd))
    spoilt = preload(device, left_out, lambda: serve(daemon, waiting=True))
    if spoilt:
        # What is imported cannot be taken back: another life in the same process, without it.
        daemon.set_inheritable(True)
        os.execv(sys.executable, [sys.executable, "-m", "xditd.rank.nursery", *sys.argv[1:], spoilt])
    daemon.send(msgspec.json.encode(Warm(seconds=time.perf_counter() - begun, left_out=tuple(left_out))))
    serve(daemon)
    # At once: there is nothing to be put in order, and libraries complain of leaks as the interpreter ends.
    os._exit(0)


def serve(daemon: socket.socket, *, waiting: bool = False) -> None:
    """Forks what it is asked for, until the daemon's end of the socket is closed.

    Args:
        waiting: only what it was asked for already.
    """
    settle()
    there = select.poll()
    there.register(daemon, select.POLLIN)
    while True:
        if waiting and not there.poll(0):
            return
        record, fds, _ = receive_fds(daemon, MAX_BIRTH, MAX_FDS)
        if not record:
            return
        birth = msgspec.json.decode(record, type=Birth)
        try:
            bear(birth, fds, daemon)
        except OSError as error:  # no processes or memory are left: the closed pipe says it
            print(f"No rank can be forked: {error.strerror}.", file=sys.stderr)
        for fd in fds:
            os.close(fd)


def settle() -> None:
    """What there is by now stays: the garbage collector would write to all of it, and so every rank have its own copy."""
    gc.collect()
    gc.freeze()


def bear(birth: Birth, fds: list[int], daemon: socket.socket) -> None:
    """Forks a rank and gives it to the daemon.

    Args:
        fds: what came with the birth.
        daemon: the nursery's own socket, which a rank has no business with.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    try:
        between = os.getpid()
        if os.fork():
            os._exit(0)
        daemon.close()
        while os.getppid() == between:  # it has but to end
            time.sleep(0.0005)
        os._exit(_begin(birth, *fds))
    except BaseException:  # whatever it is, there is one nursery
        traceback.print_exc()
    finally:
        os._exit(1)


def _begin(birth: Birth, tell: int, output: int, lane: int, arena: int = -1) -> int:
    """The new rank: makes the process what a program of its own would be, and lives."""
    begun = time.perf_counter()
    if not die_with(birth.spec.parent):
        return 1
    try:
        os.write(tell, PID.pack(os.getpid()))
    except BrokenPipeError:
        return 1  # the daemon has changed its mind
    os.close(tell)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    os.close(nothing)
    os.close(output)
    os.environ.update(birth.environment)
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # Python's own generator does so by itself; torch's begins alike in every process
        numpy.random.seed()
    return live(msgspec.structs.replace(birth.spec, lane_fd=lane, arena_fd=arena), begun)


if __name__ == "__main__":
    sys.exit(main())
