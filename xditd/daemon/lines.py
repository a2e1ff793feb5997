"""What a child process writes, as lines of the daemon's log."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

log = logging.getLogger("xditd.rank")


class Lines:
    """A pipe for a child's output.

    Args:
        about: what the lines are about, for the log.

    Attributes:
        writer: the child's end, which whoever starts it closes.

    Raises:
        OSError: no descriptors are left.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self._about = about
        self._rest = b""  # of a line that has not ended
        self._loop = asyncio.get_running_loop()
        self._fd, self.writer = os.pipe()
        os.set_blocking(self._fd, False)
        try:
            self._loop.add_reader(self._fd, self.read)
        except OSError:
            os.close(self._fd)
            os.close(self.writer)
            raise

    def read(self) -> None:
        """Logs what has come."""
        try:
            while chunk := os.read(self._fd, 65536):
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                for line in lines:
                    log.info("%s", line.decode(errors="replace")[:2000], extra=self._about)
        except BlockingIOError:
            return
        self._loop.remove_reader(self._fd)  # end of file: it closed its output, or has ended

    def close(self) -> None:
        """Logs what is left, and closes the daemon's end."""
        self.read()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
