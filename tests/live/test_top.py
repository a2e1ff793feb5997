"""`xditctl top` in a terminal of its own, against a real daemon."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from tests.live.conftest import Serve

TOP = [sys.executable, "-m", "xditd.cli.xditctl", "top"]


def _at_a_terminal() -> None:
    """In the child: the terminal becomes the controlling one, and Ctrl-C is heard, which a shell's background ignores."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, command: list[str]) -> None:
        self.leader, follower = pty.openpty()
        self.before = termios.tcgetattr(follower)
        self.follower = follower
        environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
            preexec_fn=_at_a_terminal,
        )  # fmt: skip
        self.text = ""

    def wait_for(self, pattern: str, times: int = 1) -> None:
        end = time.monotonic() + 60
        while len(re.findall(pattern, self.text)) < times:
            assert time.monotonic() < end, self.text
            self.text += os.read(self.leader, 65536).decode(errors="replace")

    def end(self) -> int:
        """Its exit code, when it ends; reads on until then, as a terminal does."""
        end = time.monotonic() + 60
        code: int | None = None
        while code is None:  # one more look when it has ended: its last words
            assert time.monotonic() < end, self.text
            code = self.process.poll()
            if select.select([self.leader], [], [], 0.05)[0]:
                self.text += os.read(self.leader, 65536).decode(errors="replace")
        return code

    def press(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.leader)
        os.close(self.follower)


@pytest.fixture
def service(serve: Serve):
    return serve()


@pytest.fixture
def top(service) -> Iterator[Terminal]:
    terminal = Terminal([*TOP, "--interval=0.1", "--endpoint", service.endpoint])
    yield terminal
    terminal.close()


def test_it_draws_frame_after_frame_until_q_and_leaves_the_terminal_as_it_was(service, top):
    top.wait_for("serving", times=3)
    with service.client() as client:
        client.load("echo/echo")
        top.wait_for("g1")
    top.press(b"xq")
    assert top.end() == 0
    assert "\x1b[?1049l" in top.text, "the screen that was there before is back"
    assert termios.tcgetattr(top.follower) == top.before


def test_ctrl_c_ends_it_with_130_and_the_terminal_as_it_was(top):
    top.wait_for("serving")
    top.press(b"\x03")
    assert top.end() == 130
    assert termios.tcgetattr(top.follower) == top.before


def test_it_outlives_the_daemon(serve, service, top):
    top.wait_for("serving")
    service.kill()
    top.wait_for("Trying again")
    top.text = ""
    serve(folder=service.folder)
    top.wait_for("serving")


def test_in_a_pipe_and_with_once_it_is_one_frame_without_colours(service):
    for options in ([], ["--once"]):
        command = [*TOP, *options, "--endpoint", service.endpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0
        assert done.stdout.count("serving") == 1
        assert "cpu:1" in done.stdout
        assert "\x1b" not in done.stdout


def test_a_daemon_that_is_not_there_is_3():
    done = subprocess.run([*TOP, "--endpoint", "ipc:///tmp/nobody-here.sock"], capture_output=True, text=True)
    assert done.returncode == 3
