"""Checks of what ranks compute with: torch, CUDA, NCCL, xfuser, attention, a world of two; and GPUs through NVML.

The probes run in processes of their own; `judge_…` turn their answers into checks and are pure.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from xditd.cli import words
from xditd.cli.doctor.check import Check, failed, ok, version, warning

XFUSER = "0.7.0"
"""The version whose seams the ranks guard."""

HOT = 85
"""Degrees Celsius from which a data-centre GPU soon slows down."""

DAEMON = "pip install 'xditd[daemon]'"


def compute_checks() -> Iterator[Check]:
    gpus = nvml()
    yield from judge_nvml(gpus)
    found = run_probe("compute", 180)
    yield from judge_compute(found, gpus.get("gpus", []))
    if found.get("gloo"):
        yield judge_world(run_probe("world", 180))


def run_probe(name: str, seconds: float) -> dict[str, Any]:
    """The answer of a probe; {"error": …} where it had none."""
    command = [sys.executable, "-m", "xditd.cli.doctor.probe", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {words.duration(seconds)}"}
    try:
        return json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (result.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"error": f"ended with {result.returncode}: {last}"}


# ----------------------------------------------------------------------------------------------------- NVML


def nvml() -> dict[str, Any]:
    """Driver and GPUs as NVML tells them: {"driver", "gpus"}, or {"error"}."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return {"error": "nvidia-ml-py is not installed", "installed": False}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error), "installed": True}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": text(pynvml.nvmlSystemGetDriverVersion()),
            "gpus": [_gpu(pynvml, h) for h in handles],
        }
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, handle: Any) -> dict[str, Any]:
    def told(name: str, *arguments: Any) -> Any:
        try:
            return getattr(pynvml, name)(handle, *arguments)
        except pynvml.NVMLError:  # not every card tells every figure
            return None

    memory = told("nvmlDeviceGetMemoryInfo")
    power = told("nvmlDeviceGetPowerUsage")
    return {
        "name": text(told("nvmlDeviceGetName") or "GPU"),
        "free": memory.free if memory else None,
        "total": memory.total if memory else None,
        "temperature": told("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        "power": power / 1000 if power is not None else None,
    }


def text(value: bytes | str) -> str:
    """Older bindings of NVML answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def judge_nvml(answer: dict[str, Any]) -> Iterator[Check]:
    if "error" in answer:
        cure = "Without a GPU models run on CPU ranks, which is for trying out and tests."
        if not answer.get("installed", True):
            cure = f"For GPUs: {DAEMON}."
        yield warning("NVIDIA driver", answer["error"], cure)
        return
    yield ok("NVIDIA driver", f"{answer['driver']}, {words.plural(len(answer['gpus']), 'GPU')}")
    for index, gpu in enumerate(answer["gpus"]):
        free = (
            "" if gpu["free"] is None else f", {words.size(gpu['free'])} free of {words.size(gpu['total'])}"
        )
        heat = "" if gpu["temperature"] is None else f", {gpu['temperature']} °C"
        power = "" if gpu["power"] is None else f", {gpu['power']:.0f} W"
        found = f"{gpu['name']}{free}{heat}{power}"
        if gpu["temperature"] is not None and gpu["temperature"] >= HOT:
            yield warning(f"GPU {index}", found, "It will slow itself down soon: look after its cooling.")
        elif gpu["free"] is not None and gpu["free"] < gpu["total"] / 10:
            yield warning(f"GPU {index}", found, "Another program fills it: `nvidia-smi` shows which.")
        else:
            yield ok(f"GPU {index}", found)


# ---------------------------------------------------------------------------------------------------- torch


def judge_compute(found: dict[str, Any], gpus: list[dict[str, Any]]) -> Iterator[Check]:
    """Args:
    found: of the probe `compute`.
    gpus: that NVML sees.
    """
    if "error" in found:
        yield failed("torch", found["error"], f"Install the daemon's packages anew: {DAEMON}.")
        return
    torch = found["torch"]
    if "error" in torch:
        yield failed("torch", torch["error"], f"{DAEMON}.")
        return
    said = torch["version"]
    if version(said) < (2, 6):
        yield failed("torch", said, "xfuser needs torch 2.6 or newer.")
    else:
        yield ok("torch", f"{said}, {'CUDA ' + found['cuda_build'] if found['cuda_build'] else 'CPU build'}")
    yield from _cuda(found, gpus)
    xfuser = found["xfuser"]
    if "error" in xfuser:
        yield failed("xfuser", xfuser["error"], f"{DAEMON}.")
    elif version(xfuser["version"]) != version(XFUSER):
        cure = f"pip install xfuser=={XFUSER}: the ranks guard the flaws of that version."
        yield failed("xfuser", xfuser["version"], cure)
    else:
        yield ok(
            "xfuser", xfuser["version"] + ("" if found["devices"] else ", on the CPU through the ranks' seam")
        )
    yield _flash(found, gpus)


def _cuda(found: dict[str, Any], gpus: list[dict[str, Any]]) -> Iterator[Check]:
    devices = found["devices"]
    if not devices:
        if gpus and not found["cuda_build"]:
            yield failed(
                "CUDA",
                "torch was built for the CPU alone",
                "Install a CUDA build: https://pytorch.org/get-started.",
            )
        elif gpus:
            cure = "The driver may be older than torch's CUDA: update it, or install an older torch."
            yield failed("CUDA", f"torch sees none of {words.plural(len(gpus), 'GPU')}", cure)
        return
    broken = [str(i) for i, device in enumerate(devices) if not device["works"]]
    if broken:
        yield failed(
            "CUDA",
            f"device {words.joined(broken)} computes wrongly",
            "Run `nvidia-smi -q` and check the hardware.",
        )
    else:
        yield ok(
            "CUDA", ", ".join(f"cuda:{i} {d['name']} (sm {d['capability']})" for i, d in enumerate(devices))
        )
    if not found.get("nccl"):
        yield failed("NCCL", "this torch has none", f"Several GPUs need it: {DAEMON} on Linux.")
    elif len(devices) > 1 and not all(device["peers"] for device in devices):
        cure = "Ranks then talk through host memory, which is slower; NVLink or PCIe peer access would help."
        yield warning("NCCL", f"{found['nccl']}, but GPUs cannot reach each other's memory", cure)
    else:
        yield ok("NCCL", found["nccl"])


def _flash(found: dict[str, Any], gpus: list[dict[str, Any]]) -> Check:
    flash = found["flash_attn"]
    if "error" not in flash:
        return ok("flash-attn", flash["version"])
    if not gpus:
        return ok("flash-attn", "not there, and not needed without a GPU")
    missing = flash["error"].startswith("ModuleNotFoundError")
    return warning(
        "flash-attn",
        "not installed" if missing else flash["error"],
        "Optional. Without it torch's own attention is used, slightly slower on some GPUs: pip install 'xditd[flash]'.",
    )


def judge_world(found: dict[str, Any]) -> Check:
    if "error" in found:
        return failed(
            "two ranks over gloo",
            found["error"],
            "Ranks could not meet: check that this machine's own host name resolves (/etc/hosts) and that no firewall "
            "stops its loopback; GLOO_SOCKET_IFNAME=lo chooses it.",
        )
    return ok("two ranks over gloo", "met and added a number")
