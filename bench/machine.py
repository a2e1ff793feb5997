"""What a measurement ran on, in a few words: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
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


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
