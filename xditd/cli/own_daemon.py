"""A daemon of our own for a while: started in a temporary folder, stopped in order, nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from xditd.cli.commands import connect
from xditd.client import Client
from xditd.protocol.errors import Code, XditError

STOP = 30.0
"""Seconds that it gets to stop by itself before it is killed, and its ranks with it."""

_PR_SET_PDEATHSIG = 1


class OwnDaemon:
    """A daemon with CPU ranks that serves the models of a folder; a context manager.

    Attributes:
        folder: temporary, gone afterwards.
        endpoint: where it listens.
        pid: of its process; None before it is started.
    """

    def __init__(self, cpu_ranks: int, models: Path) -> None:
        """
        Args:
            models: a folder of models by ComfyUI's kinds.
        """
        parent = None if len(tempfile.gettempdir()) < 60 else "/tmp"  # the path of a socket must be short
        self.folder = Path(tempfile.mkdtemp(prefix="xditd-demo-", dir=parent))
        self.endpoint = f"ipc://{self.folder}/xditd.sock"
        self._log = self.folder / "xditd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = (
            f"endpoint = {json.dumps(self.endpoint)}\n"
            f'[devices]\nkind = "cpu"\ncpu_ranks = {cpu_ranks}\nthreads = 1\n'
            f"[models]\ncomfyui = {json.dumps(str(models.parent))}\n"
            "[deadlines]\ndrain = 5\n"
        )

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process; `connect` waits until it serves."""
        settings = self.folder / "xditd.toml"
        settings.write_text(self._settings)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "xditd.daemon", "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who then stop it in order
                preexec_fn=_end_with_parent,
            )

    def connect(self, seconds: float = 60.0) -> Client:
        """A client of it, as soon as it answers.

        Raises:
            XditError: `daemon_not_found` where it ended, or did not answer in time.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                return connect(self.endpoint, timeout=0.5)
            except XditError as error:
                if error.code is not Code.DAEMON_NOT_FOUND:
                    raise
                if self._process is None or self._process.poll() is not None:
                    raise XditError(Code.DAEMON_NOT_FOUND, "The daemon ended as it started.") from error
                if time.monotonic() >= end:
                    raise XditError(Code.DAEMON_NOT_FOUND, "The daemon did not answer in time.") from error

    def log(self) -> list[str]:
        """The lines that it has logged."""
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []

    def stop(self) -> None:
        """Asks it to stop, waits, and kills what does not."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks are ended by the kernel
            self._process.wait()

    def __enter__(self) -> OwnDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _undisturbed():
            self.stop()
            shutil.rmtree(self.folder, ignore_errors=True)


def _end_with_parent() -> None:
    """In the child, before it becomes the daemon: the kernel stops it where we are killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not leave behind what the first one is cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
