"""A real daemon for a benchmark, in a folder of its own, gone with all it made when the benchmark is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAST_WORDS = 4000
"""Bytes of a failed daemon's log that are shown."""


@contextmanager
def serving(module: str = "xditd.daemon", /, **settings: object) -> Iterator[str]:
    """Runs `python -m xditd.daemon`, or what stands in for it, and yields its endpoint. A client's own timeout waits until it answers.

    Args:
        settings: keys of its configuration, with `__` for the dot: `devices__cpu_ranks=1`.

    Raises:
        RuntimeError: it ended before it was asked to, or had something to say when the benchmark failed: with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="xditd-bench-") as folder:
        endpoint = f"ipc://{folder}/xditd.sock"
        # Without a nursery, whose imports would take a core beside the first that is measured.
        keys = {"endpoint": endpoint, "log.level": "warning", "nursery": False} | {
            name.replace("__", "."): value for name, value in settings.items()
        }
        command = [sys.executable, "-m", module]
        for key, value in keys.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        failure: Exception | None = None
        try:
            yield endpoint
        except Exception as error:
            failure = error
        finally:
            ended = process.poll()
            if ended is None:
                process.send_signal(signal.SIGTERM)
                process.wait(30)
        # A client often fails before it is seen that the daemon does.
        words = log.read_text(errors="replace")[-LAST_WORDS:]
        if ended is not None or (failure is not None and words):
            how = "was in trouble" if ended is None else f"ended with code {ended}"
            raise RuntimeError(f"The daemon {how} during the benchmark:\n{words}") from failure
        if failure is not None:
            raise failure
