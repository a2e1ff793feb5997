"""The demo: from nothing to a picture by the real daemon and two real ranks, and nothing left behind however it ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tools.train_demo.judge import judge
from tools.train_demo.scenes import Description, Thing
from xditd.cli.own_daemon import OwnDaemon
from xditd.protocol.errors import XditError

PROMPT = "a large red square"
SAID = Description((Thing("square", "red", "large"),))

XDITCTL = [sys.executable, "-m", "xditd.cli.xditctl"]


@pytest.fixture
def demo(tmp_path):
    """Starts `xditctl demo` with a temporary folder of its own; ends what a failed test leaves."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*XDITCTL, "demo", PROMPT, "-o", str(tmp_path / "x.png")],
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


def test_it_draws_what_it_is_told_and_shows_two_ranks(demo, tmp_path):
    said, _ = demo().communicate(timeout=240)
    with Image.open(tmp_path / "x.png") as picture:
        verdict = judge(np.asarray(picture) / 255, SAID)
        assert picture.info["prompt"] == PROMPT
    assert verdict.fits, verdict
    for word in [
        "ulysses 2 on cpu:0, cpu:1",
        "16/16",
        "$ xditctl status",
        f"256×256, {PROMPT}",
        "The daemon is stopped",
    ]:
        assert word in said
    group = said[said.index("ulysses 2 on", said.index("xditctl status")) :].splitlines()
    assert [row.split()[2] for row in group if row.split()[:1] in (["0"], ["1"])][:2] == ["cpu:0", "cpu:1"]
    assert not _folder(said).exists()


def test_a_word_that_the_model_has_not_learnt_is_said_at_once(tmp_path):
    made = subprocess.run(
        [*XDITCTL, "demo", "a red circel", "-o", str(tmp_path / "x.png")], capture_output=True, text=True
    )
    assert made.returncode == 4
    assert "does not know the word 'circel'; did you mean circle" in made.stderr
    assert "bad_value" in made.stderr
    assert not made.stdout


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


def test_its_daemon_is_stopped_in_order(tmp_path):
    with OwnDaemon(1, tmp_path / "models") as daemon:
        daemon.start()
        with daemon.connect() as client:
            assert [device.name for device in client.status().devices] == ["cpu:0"]
    assert daemon._process.returncode == 0


def test_a_daemon_that_cannot_start_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with OwnDaemon(1, tmp_path / "models") as daemon:
        daemon.start()
        with pytest.raises(XditError, match="ended as it started"):
            daemon.connect()
