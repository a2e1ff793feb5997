"""One process of a peer: a function of a module, run with descriptors that it inherits.

`python -m bench.handoff.child bench.handoff.peers.raw3 rank 5 7` calls `raw3.rank(5, 7)`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
"""The repository: children import `bench` from wherever they are started."""


def start(module: str, function: str, *fds: int, args: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Starts the process; it gets `fds` under their own numbers, and `args` after them as strings."""
    command = [sys.executable, "-m", "bench.handoff.child", module, function]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([*command, *map(str, fds), *args], pass_fds=fds, env=environment)


def end(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends the processes and waits for them."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    _, named, called, *rest = sys.argv
    getattr(importlib.import_module(named), called)(*(int(word) if word.isdigit() else word for word in rest))
