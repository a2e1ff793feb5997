"""Single keys of a terminal, as they are pressed. Where standard input is none, there are no keys and time just passes."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any


class Keys:
    """A context manager: inside, keys come at once and are not shown; afterwards the terminal is as it was."""

    def __init__(self) -> None:
        self._fd = -1
        self._before: list[Any] = []

    def __enter__(self) -> Keys:
        if sys.stdin is not None and sys.stdin.isatty():
            self._fd = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)  # Ctrl-C stays what it is
        return self

    def pressed(self, seconds: float) -> str:
        """The keys of that time, at once when there are some; "" where there are none."""
        if self._fd < 0:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if not ready:
            return ""
        keys = os.read(self._fd, 64)
        return keys.decode(errors="replace") if keys else "q"  # the terminal is gone

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
