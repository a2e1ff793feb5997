"""The demo: from nothing to a picture by the real daemon and two real ranks, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

XDITCTL = str(Path(sys.executable).with_name("xditctl"))


@pytest.fixture
def demo(tmp_path):
    """Starts `xditctl demo` with a temporary folder of its own; ends what a failed test leaves."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [XDITCTL, "demo", "--size", "64x64", "--steps", "2", "-o", str(tmp_path / "x.png")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path / "t")},
        )
        started.append(process)
        return process

    (tmp_path / "t").mkdir()
    yield start
    for process in started:
        for child in _below(process.pid):
            child.kill()
        process.kill()
        process.communicate()


def _below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def _gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


def test_it_ends_with_a_picture_and_shows_two_ranks(demo, tmp_path):
    said, _ = demo().communicate(timeout=240)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (64, 64)
        assert len(picture.getcolors(64 * 64) or []) > 100, "noise has many colours; an empty picture has one"
    for word in [
        "ulysses 2 on cpu:0, cpu:1",
        "2/2",
        "$ xditctl status",
        "abstract noise",
        "The daemon is stopped",
    ]:
        assert word in said
    group = said[said.index("ulysses 2 on", said.index("xditctl status")) :].splitlines()
    assert [row.split()[2] for row in group if row.split()[:1] in (["0"], ["1"])][:2] == ["cpu:0", "cpu:1"]
    assert not list((tmp_path / "t").glob("xditd-demo-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(demo, tmp_path, number):
    """While its ranks start: the worst moment, with a daemon and processes that have not said a word."""
    process = demo()
    lines = iter(process.stdout.readline, "")
    assert any("ranks" in line for line in lines)
    children = _below(process.pid)
    assert len(children) >= 2, "a daemon and at least one rank"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert _gone(children)
    assert not list((tmp_path / "t").glob("xditd-demo-*"))
    assert not (tmp_path / "x.png").exists()


def test_killed_it_takes_its_daemon_and_ranks_along(demo):
    process = demo()
    assert any("ranks" in line for line in iter(process.stdout.readline, ""))
    children = _below(process.pid)
    process.kill()
    assert _gone(children)
