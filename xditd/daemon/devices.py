"""The devices that the daemon owns, without torch: as NVML lists GPUs, or ranks on a CPU. `gauges` tells their figures.

GPUs are named by their index in PCI order, the order of nvidia-smi; ranks are started with
CUDA_DEVICE_ORDER=PCI_BUS_ID so that "cuda:1" is the same card here, there and in ComfyUI.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from xditd.daemon.ports import HOST, Memory
from xditd.protocol import kernels
from xditd.protocol.errors import Code, XditError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `handle` is NVML's, None for a CPU rank; the compute capability is None where NVML does not tell it."""

    name: str
    model: str
    uuid: str = ""
    handle: Any = None
    capability: tuple[int, int] | None = None

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


def own(kind: str, use: Sequence[str], cpu_ranks: int) -> list[Device]:
    """The devices that the configuration names.

    Args:
        kind: "auto" (GPUs where there are any), "cuda" or "cpu".
        use: GPUs by index or UUID; empty is all.
        cpu_ranks: how many "devices" a CPU stands for.

    Raises:
        XditError: `bad_config` where a named GPU is not there.
    """
    if kind != "cpu":
        gpus = _gpus()
        if gpus:
            return _choose(gpus, use)
        if kind == "cuda" or use:
            raise XditError(
                Code.BAD_CONFIG,
                "The configuration asks for GPUs, but NVML sees none; check `nvidia-smi`, the driver, and that "
                "nvidia-ml-py is installed (pip install 'xditd[daemon]').",
            )
    return [Device(f"cpu:{index}", "CPU") for index in range(cpu_ranks)]


def check_attention(kernel: str, devices: Sequence[Device]) -> None:
    """Refuses a kernel that cannot be had on these devices; says in one line where a faster one is not installed.

    Raises:
        XditError: `bad_config`.
    """
    on_gpus = any(device.is_cuda for device in devices)
    if kernel and not on_gpus:
        raise XditError(
            Code.BAD_CONFIG,
            f"compute.attention asks for {kernel}, which runs on GPUs, but the daemon has CPU ranks; leave the key out.",
        )
    if problem := kernels.lacking(kernel):
        raise XditError(Code.BAD_CONFIG, problem)
    for device in devices:
        if device.capability is not None and (problem := kernels.unfit(kernel, device.capability)):
            raise XditError(
                Code.BAD_CONFIG,
                f"compute.attention asks for {kernel}, which {problem}, as {device.name} is ({device.model}); leave the key out, "
                "and each GPU has the best that there is for it.",
            )
    if on_gpus and not any(map(kernels.installed, kernels.PACKAGES)):
        log.warning(
            "⚠️ flash-attn is not installed: ranks take cuDNN's attention, or torch's (status shows which)."
        )


class Memories:
    """What devices say of their memory now, for whoever decides which models have room.

    Args:
        reserve: bytes of each GPU that are not ours.
        cpu: bytes that CPU ranks may take, all of them together; 0: theirs is not counted.
    """

    def __init__(self, devices: Sequence[Device], reserve: int = 0, cpu: int = 0) -> None:
        self._devices = {device.name: device for device in devices}
        self._reserve = reserve
        self._cpu = cpu

    def memory(self, pool: str) -> Memory | None:
        """Of a GPU by its name, of all CPU ranks by "cpu", of the machine by `HOST`; None where it is not counted."""
        if pool == HOST:
            machine = psutil.virtual_memory()
            return Memory(int(machine.total), int(machine.available))
        if pool == "cpu":
            return Memory(self._cpu, int(psutil.virtual_memory().available)) if self._cpu else None
        told = self._told(pool)
        if told is None:
            return None
        return Memory(max(0, told.total - self._reserve), max(0, told.free - self._reserve))

    def total_and_used(self, device: str) -> tuple[int | None, int | None]:
        """Bytes of a device, by all processes, whether they are counted or not."""
        if self._devices[device].handle is None:
            machine = psutil.virtual_memory()
            return int(machine.total), int(machine.total - machine.available)
        told = self._told(device)
        return (told.total, told.total - told.free) if told is not None else (None, None)

    def _told(self, device: str) -> Memory | None:
        import pynvml

        try:
            told = pynvml.nvmlDeviceGetMemoryInfo(self._devices[device].handle)
        except pynvml.NVMLError:
            return None
        return Memory(int(told.total), int(told.free))


def _gpus() -> list[Device]:
    try:
        import pynvml

        pynvml.nvmlInit()
    # Not installed, no driver, no permission: each means "no GPU that we could use".
    except Exception as error:
        log.debug("No GPUs: %s.", error)
        return []
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
        gpus.append(Device(f"cuda:{index}", _text(name), _text(uuid), handle, _capability(handle)))
    return gpus


def _capability(handle: Any) -> tuple[int, int] | None:
    import pynvml

    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


def _choose(gpus: list[Device], use: Sequence[str]) -> list[Device]:
    if not use:
        return gpus
    chosen = []
    for wanted in use:
        matches = [g for g in gpus if wanted in (g.name, g.name.partition(":")[2], g.uuid)]
        if not matches:
            there = ", ".join(f"{g.name} ({g.model}, {g.uuid})" for g in gpus)
            raise XditError(Code.BAD_CONFIG, f"devices.use names GPU {wanted!r}, but there are: {there}.")
        if matches[0] in chosen:
            raise XditError(Code.BAD_CONFIG, f"devices.use names GPU {wanted!r} twice.")
        chosen.append(matches[0])
    return chosen


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
