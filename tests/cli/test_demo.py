"""The demo: from nothing to a picture by the real daemon and two real ranks, and nothing left behind however it ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from xditd.cli.own_daemon import OwnDaemon
from xditd.protocol.errors import XditError

XDITCTL = [sys.executable, "-m", "xditd.cli.xditctl"]


@pytest.fixture
def demo(tmp_path):
    """Starts `xditctl demo` with a temporary folder of its own; ends what a failed test leaves."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*XDITCTL, "demo", "--size", "64x64", "--steps", "2", "-o", str(tmp_path / "x.png")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that starts the tests in its background has them, and all that they start, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

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
    for process in alive:
        process.kill()
    return not alive


def _started(process: subprocess.Popen[str]) -> tuple[Path, list[psutil.Process]]:
    """Its temporary folder, and its processes, as soon as ranks start: the worst moment to be ended."""
    said = ""
    for line in iter(process.stdout.readline, ""):
        said += line
        if "ranks" in line:
            break
    children = _below(process.pid)
    assert len(children) >= 2, f"a daemon and at least one rank: {said}"
    return _folder(said), children


def _folder(said: str) -> Path:
    return Path(re.search(r"ipc://(/\S+)/xditd\.sock", said)[1])


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
    assert not _folder(said).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(demo, tmp_path, number):
    process = demo()
    folder, children = _started(process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert _gone(children)
    assert not folder.exists()
    assert not (tmp_path / "x.png").exists()


def test_killed_it_takes_its_daemon_and_ranks_along(demo):
    process = demo()
    folder, children = _started(process)
    process.kill()
    assert _gone(children)
    shutil.rmtree(folder)


def test_its_daemon_is_stopped_in_order():
    with OwnDaemon(cpu_ranks=1) as daemon:
        daemon.start()
        with daemon.connect() as client:
            assert [device.name for device in client.status().devices] == ["cpu:0"]
    assert daemon._process.returncode == 0


def test_a_daemon_that_cannot_start_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with OwnDaemon(cpu_ranks=1) as daemon:
        daemon.start()
        with pytest.raises(XditError, match="ended as it started"):
            daemon.connect()
