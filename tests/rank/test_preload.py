"""Imports ahead of ranks: what makes a process unfit to be forked is seen, and a fork computes as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def tell(program: str) -> Any:
    """What a program of its own prints, as JSON."""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


def test_an_import_that_leaves_a_thread_is_named() -> None:
    told = tell(
        """
import json, threading
from xditd.rank import preload
done = []
def thread(): threading.Thread(target=threading.Event().wait, daemon=True).start()
preload.STEPS = {"one": lambda: done.append(1), "two": thread, "three": lambda: done.append(3)}
print(json.dumps([preload.preload("cpu", ["two"]), list(done), preload.preload("cpu"), preload.unfit(), done]))
"""
    )
    assert told == ["", [1, 3], "two", "it left 1 threads running", [1, 3, 1]]


def test_cuda_in_use_is_seen() -> None:
    told = tell(
        """
import json, os, sys, types
from xditd.rank import preload
assert preload.unfit() == ""
preload.UVM = os.devnull  # a machine without a GPU has no such device
file = open(os.devnull)
print(json.dumps(preload.unfit()))
"""
    )
    assert told == "CUDA is in use"


def test_a_fork_computes_with_the_threads_that_its_spec_says() -> None:
    """Whatever the nursery's environment said when torch was loaded."""
    told = tell(
        """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "3"
from xditd.rank.preload import preload
assert preload("cpu", ["diffusers", "xfuser", "transformers"]) == ""
assert "OPENBLAS_NUM_THREADS" not in os.environ
from types import SimpleNamespace
from xditd.rank.loading import _prepare
import torch
seen = []
for threads in (1, 2):
    reader, writer = os.pipe()
    if not os.fork():
        _prepare(SimpleNamespace(device="cpu:0", store="", threads=threads, part="transformer"))
        torch.randn(512, 512) @ torch.randn(512, 512)
        tasks = len(os.listdir("/proc/self/task"))
        os.write(writer, json.dumps([torch.get_num_threads(), tasks]).encode())
        os._exit(0)
    seen.append(json.loads(os.read(reader, 100)))
print(json.dumps(seen))
"""
    )
    assert told[0] == [1, 1]
    threads, tasks = told[1]
    assert threads == 2
    assert 2 <= tasks <= 4  # torch has two pools of as many
