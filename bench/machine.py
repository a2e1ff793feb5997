"""What a measurement ran on, in a few words: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata


def describe(*packages: str) -> dict[str, str]:
    """Facts of this machine and of the named packages, for a table and for JSON."""
    facts = {
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores for this process",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 minutes, at the start)",
    }
    for package in packages:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


class Quiet:
    """Waits for a moment in which nobody else uses the machine, and counts when none came.

    A busy core changes more than the noise: processes that share the other core wake each other faster.
    """

    WINDOW = 0.05  # seconds that are looked at; the kernel counts in hundredths
    BUSY = 0.1  # share of all cores that others may use

    def __init__(self, patience: float) -> None:
        """
        Args:
            patience: seconds to wait at most, in all; 0 does not look.
        """
        self.left = patience
        self.missed = 0

    def __call__(self) -> None:
        begin = time.monotonic()
        while self.left > time.monotonic() - begin:
            if self._use() <= self.BUSY:
                self.left -= max(0.0, time.monotonic() - begin - self.WINDOW)
                return
        self.left = 0.0
        self.missed += 1

    def _use(self) -> float:
        before = _ticks()
        time.sleep(self.WINDOW)
        spent = [now - then for now, then in zip(_ticks(), before, strict=True)]
        idle = spent[3] + spent[4]  # waiting for a disk is idle too
        return 1 - idle / max(sum(spent), 1)


def _ticks() -> list[int]:
    with open("/proc/stat", encoding="ascii") as lines:
        return [int(value) for value in lines.readline().split()[1:9]]


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
