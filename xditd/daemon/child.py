"""Child processes of the daemon, by their pidfds: signalled and reaped without taking another for them. Knows no ranks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Set

_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """One child, whoever forked it.

    Args:
        pid: of a child that nobody else reaps.
        popen: that started it, where one did; it is told of the end.

    Raises:
        OSError: no descriptors are left. The child is killed and reaped then.
    """

    __slots__ = ("_code", "_popen", "fd", "pid")

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._popen = popen
        self._code: int | None = None
        try:
            self.fd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            self._keep(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            raise

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        code = self._reap(0)
        assert code is not None
        return code

    def close(self) -> None:
        os.close(self.fd)

    def _reap(self, flags: int) -> int | None:
        if self._code is None:
            ended = os.waitid(os.P_PIDFD, self.fd, os.WEXITED | flags)
            if ended is not None:
                self._keep(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        return self._code

    def _keep(self, code: int) -> None:
        self._code = code
        if self._popen is not None:
            self._popen.returncode = code  # else it would wait for a pid that may be somebody else's by then


def how_it_ended(code: int) -> str:
    """An exit code in words: "was killed by SIGKILL"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def adopt_orphans() -> None:
    """From now on a descendant whose parent ends becomes this process's child, and `reap_strays` has to be called."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_strays(known: Set[int]) -> None:
    """Reaps those who ended and are none of ours: a rank's own children, which outlived it.

    Args:
        known: pids of children whom somebody else reaps.
    """
    with contextlib.suppress(ChildProcessError):  # there are none at all
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in known:
                return  # its pidfd is about to say so; it may hide a stray until then
            os.waitpid(ended.si_pid, 0)
