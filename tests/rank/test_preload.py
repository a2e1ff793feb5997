"""Imports ahead of ranks: what makes a process unfit to be forked is seen, and a fork computes as it is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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


DRIVER = """
static int begun;
int cuInit(unsigned flags) { begun = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = begun; return begun ? 0 : 3; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="makes a driver of its own")
def test_cuda_in_use_is_seen_whoever_began_it_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    driver = tmp_path / "libcuda-of-a-test.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, tmp_path / "driver.c"], check=True)
    told = tell(
        f"""
import ctypes, json
from xditd.rank import preload
preload.DRIVER = {str(driver)!r}
told = [preload.unfit()]
driver = ctypes.CDLL(preload.DRIVER)
told.append(preload.unfit())
driver.cuInit(0)
told.append(preload.unfit())
print(json.dumps(told))
"""
    )
    assert told == ["", "", "CUDA is in use"]


def test_neither_nvml_nor_cuda_is_asked_for_a_gpu_by_the_import_of_diffusers() -> None:
    """With torch made to believe that it was built for CUDA: this is no machine with a GPU."""
    told = tell(
        """
import json, os
from xditd.rank import preload
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the nursery has it: numpy comes with torch
import torch
asked = []
def asking(name, answer):
    def ask(*arguments):
        asked.append(name)
        return answer
    return ask
torch.cuda._is_compiled = lambda: True
torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
torch._C._cuda_getCurrentRawStream = lambda device: 0
torch._C._cuda_getDeviceCount = asking("CUDA", 1)
torch.cuda._device_count_nvml = asking("NVML", -1)
torch.cuda._lazy_init = asking("torch", None)
assert preload.preload("cuda", ["transformers"]) == ""
import diffusers.utils.torch_utils as torch_utils
ahead = list(asked)
torch.cuda.is_available()
print(json.dumps([torch_utils.torch_device, ahead, asked]))
"""
    )
    assert told == ["cuda", [], ["CUDA"]]  # after the imports torch asks as ever


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
