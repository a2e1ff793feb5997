"""What ranks import, imported ahead of them, as `rank.loading` would: and whether a process can be forked after it.

It cannot where an import has begun to use CUDA, which no fork can go on using, or left a thread running, which a fork has not.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xditd.rank.loading import LEFT_OUT, silence

FOR_IMPORTS = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch asks NVML, not CUDA, whether there is a GPU
    "OPENBLAS_NUM_THREADS": "1",  # numpy's library starts its threads as it is loaded
}
"""Variables of the time of the imports; no rank has them of us."""

DRIVER = "libcuda.so.1"

NOT_INITIALIZED = 3
"""CUDA_ERROR_NOT_INITIALIZED: what every function of the driver returns before cuInit (CUDA driver API, Initialization)."""


def preload(device: str, left_out: Sequence[str] = (), nearly: Callable[[], None] = lambda: None) -> str:
    """Imports the libraries in `STEPS`, and modules of ours that use them.

    Args:
        device: "cpu" or "cuda", of the ranks to come.
        left_out: steps that are not to be done.
        nearly: called when only the last step is left, which most ranks can do without.

    Returns:
        The step after which no rank can be forked, where there is one: that process is of no use. Else "".
    """
    with _variables(FOR_IMPORTS):
        for name, step in STEPS.items():
            if name in left_out or (name == "xfuser" and device != "cpu"):
                continue  # xfuser asks CUDA about the GPU as it is imported; and it is the least of them
            if name == "transformers":
                nearly()
            with _gpu_taken_for_granted(device):
                step()
            if why := unfit():
                print(f"No rank can be forked after the import of {name}: {why}.", file=sys.stderr)
                return name
    return ""


def unfit() -> str:
    """Why no fork of this process could be a rank; "" where one can."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "torch has begun to use CUDA"
    if _driver_begun():
        return "CUDA is in use"
    threads = len(os.listdir("/proc/self/task"))
    return f"it left {threads - 1} threads running" if threads > 1 else ""


def _torch() -> None:
    silence()
    for name in ("torch", "torch.distributed"):
        importlib.import_module(name)


def _diffusers() -> None:
    """Without what `rank.loading` leaves out: diffusers looks once for what is installed."""
    with _hidden(LEFT_OUT):
        families = importlib.import_module("xditd.models.families")
        rows = [row for row in families.FAMILIES.values() if row.part != "text_encoder"]
        for row in rows:
            assert row.kind
            if row.staged:
                importlib.import_module(f"xditd.models.{row.folder}.stages")
        for name in ("cfg", "denoiser", "device", "parallel", "pipefusion", "tensor", "vae"):
            importlib.import_module(f"xditd.rank.{name}")


def _xfuser() -> None:
    with _hidden(LEFT_OUT):
        importlib.import_module("xditd.rank.xfuser_seam").preload()


def _transformers() -> None:
    with _hidden(("peft",)):
        families = importlib.import_module("xditd.models.families")
        for row in families.FAMILIES.values():
            assert row.kind
        importlib.import_module("xditd.rank.text")


STEPS: dict[str, Callable[[], None]] = {
    "torch": _torch,
    "diffusers": _diffusers,
    "xfuser": _xfuser,
    "transformers": _transformers,  # for text encoders alone
}


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for a while."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _gpu_taken_for_granted(device: str) -> Iterator[None]:
    """Has torch say, for a while and without asking anybody, that there is a GPU, where ranks have some.

    diffusers asks as it is imported (`utils.torch_utils.torch_device`). torch asks NVML, for `FOR_IMPORTS`, but CUDA where
    NVML does not answer, as in a container without it.
    """
    torch = sys.modules.get("torch")
    if torch is None or device == "cpu":
        yield
        return
    count = torch.cuda.device_count
    torch.cuda.device_count = lambda: 1
    try:
        yield
    finally:
        torch.cuda.device_count = count


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Has packages look not installed, for a while."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _driver_begun() -> bool:
    """Whether anything in this process has called cuInit. The driver itself says so, and is not begun by being asked.

    An open /dev/nvidia-uvm would be a guess: nothing promises that NVML, which a fork can go on from, leaves it closed.
    """
    try:
        driver = ctypes.CDLL(DRIVER, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False  # it is not even loaded
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED)
