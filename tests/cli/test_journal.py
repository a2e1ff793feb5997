"""Where the log of a daemon is found, and how a file is followed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.cli import journal
from xditd.cli.journal import Log, follow, of_daemon, unit_of
from xditd.protocol.errors import XditError


def next_line(lines) -> str:
    return next(line for line in lines if line)


def test_a_file_is_followed_over_rotation_and_truncation(tmp_path: Path):
    path = tmp_path / "log"
    path.write_text("one\ntwo\nthree\n")
    lines = follow(path, 2)
    assert [next(lines), next(lines), next(lines)] == ["two\n", "three\n", ""]
    with path.open("a") as file:
        file.write("four\n")
    assert next_line(lines) == "four\n"
    path.rename(tmp_path / "log.1")
    assert next(lines) == "", "nothing there yet"
    path.write_text("five\n")
    assert next_line(lines) == "five\n"
    path.write_text("six\n")  # emptied and begun anew, and shorter than what was read
    assert next_line(lines) == "six\n"


def test_the_file_that_standard_error_goes_to_is_the_log(tmp_path: Path):
    path = tmp_path / "log"
    with path.open("wb") as log:
        daemon = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=log)
    try:
        path.write_text("".join(f"{i}\n" for i in range(10)))
        place = of_daemon(daemon.pid)
        assert place.path == path
        assert str(path) in place.what
        assert place.last(2) == "8\n9\n"
    finally:
        daemon.communicate(b"\n")


def test_a_pipe_is_nothing_to_follow_and_says_so(monkeypatch):
    monkeypatch.setattr(journal, "unit_of", lambda pid: ("", False))
    daemon = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with pytest.raises(XditError, match=r"logs to pipe:.*run it as a service"):
            of_daemon(daemon.pid)
    finally:
        daemon.communicate(b"\n")


def test_a_daemon_of_another_machine_is_not_here():
    with pytest.raises(XditError, match="not on this machine"):
        of_daemon(2**22 + 1)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/xditd.service\n", ("xditd.service", False)),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/xditd.service", ("xditd.service", True)),
        ("0::/user.slice/user-1000.slice/session-3.scope", ("", False)),
        ("0::/", ("", False)),
        ("1:name=systemd:/system.slice/xditd.service\n0::/", ("xditd.service", False)),
    ],
)
def test_the_unit_of_a_process_is_the_last_of_its_cgroup(monkeypatch, cgroup, unit):
    monkeypatch.setattr(Path, "read_text", lambda self: cgroup)
    assert unit_of(os.getpid()) == unit


def test_the_journal_is_asked_for_the_unit_of_whoever_runs_it():
    system, user = Log("", unit="xditd.service"), Log("", unit="xditd.service", user=True)
    assert system.command(50, follow=False) == [
        "journalctl", "--unit", "xditd.service", "--no-pager", "--lines=50",
    ]  # fmt: skip
    assert user.command(50, follow=True)[1:3] == ["--user-unit", "xditd.service"]
    assert user.command(50, follow=True)[-1] == "--follow"
