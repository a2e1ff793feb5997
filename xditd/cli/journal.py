"""Where a daemon's log is: the file that its standard error goes to, or the journal of its unit; and its last lines."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xditd.protocol.errors import Code, XditError

UNIT = "xditd"
"""The unit's name, as systemd/ has it."""


@dataclass(frozen=True, slots=True)
class Log:
    """One place. Either `path` or `unit` is there."""

    what: str  # for people
    path: Path | None = None
    unit: str = ""
    user: bool = False  # the unit is of the user's own manager

    def command(self, lines: int, *, follow: bool) -> list[str]:
        """How to read the journal."""
        arguments = ["journalctl", "--user-unit" if self.user else "--unit", self.unit, "--no-pager"]
        return [*arguments, f"--lines={lines}", *(["--follow"] if follow else [])]

    def last(self, lines: int) -> str:
        """The last lines.

        Raises:
            XditError: `daemon_not_found` where it cannot be read.
        """
        if self.path is not None:
            try:
                with self.path.open(errors="replace") as file:
                    return "".join(deque(file, maxlen=lines))
            except OSError as error:
                raise XditError(
                    Code.NOT_PERMITTED, f"{self.path} cannot be read: {error.strerror}."
                ) from error
        done = subprocess.run(self.command(lines, follow=False), capture_output=True, text=True, timeout=30)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise XditError(Code.NOT_PERMITTED, f"journalctl failed: {said}.")
        return done.stdout


def of_daemon(pid: int) -> Log:
    """The log of a daemon that runs.

    Raises:
        XditError: `not_permitted` where it cannot be followed: a terminal, a pipe, another user's.
    """
    try:
        target = os.readlink(f"/proc/{pid}/fd/2")
        if stat.S_ISREG(os.stat(f"/proc/{pid}/fd/2").st_mode):
            return Log(f"{target}, the standard error of the daemon (pid {pid})", path=Path(target))
    except FileNotFoundError:
        raise XditError(
            Code.NOT_PERMITTED,
            f"The daemon (pid {pid}) is not on this machine, or has just ended: look there.",
        ) from None
    except PermissionError:
        target = "a place that you may not see"
    unit, user = unit_of(pid)
    if unit and shutil.which("journalctl") and not target.startswith("/"):
        return _journal(unit, user)
    raise XditError(
        Code.NOT_PERMITTED,
        f"The daemon (pid {pid}) logs to {target}: look there, or send its output to a file or run it as a service.",
    )


def of_unit() -> Log | None:
    """The journal of an installed unit, the user's own before the system's; None where there is none."""
    if not (shutil.which("systemctl") and shutil.which("journalctl")):
        return None
    for user in (True, False):
        scope = ["--user"] if user else []
        asked = subprocess.run(["systemctl", *scope, "cat", UNIT], capture_output=True, text=True, timeout=10)
        if not asked.returncode:
            return _journal(f"{UNIT}.service", user)
    return None


def unit_of(pid: int) -> tuple[str, bool]:
    """The unit that a process is in, and whether it is of a user's own manager; "" where it is in none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return "", False
    for line in lines:
        *above, last = line.rpartition(":")[2].split("/")
        if last.endswith(".service"):
            return last, any(part.startswith("user@") for part in above)
    return "", False


def follow(path: Path, lines: int) -> Iterator[str]:
    """The last lines of a file, and those that come; also of one that takes its place, or is emptied.

    Yields "" where nothing has come, so that the reader may do as it likes in between; it is to wait then.
    """
    file = path.open(errors="replace")
    try:
        yield from deque(file, maxlen=lines)
        while True:
            part = file.readline()
            if part:
                yield part
                continue
            here = os.fstat(file.fileno())
            try:
                there = path.stat()
            except FileNotFoundError:
                there = here
            if not os.path.samestat(here, there):
                file.close()
                file = path.open(errors="replace")
            elif there.st_size < file.tell():
                file.seek(0)
            else:
                yield ""
    finally:
        file.close()


def _journal(unit: str, user: bool) -> Log:
    whose = "of your own manager" if user else "of the system"
    return Log(f"the journal of {unit} ({whose})", unit=unit, user=user)
