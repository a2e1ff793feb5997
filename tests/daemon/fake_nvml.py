"""An NVML without a driver: GPUs made of tables. What a card does not tell raises, as the real one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As pynvml's."""


@dataclass
class Gpu:
    """One card. A figure that is None is not supported by it."""

    index: int
    memory: tuple[int, int] | None = (80 << 30, 20 << 30)  # total, used
    temperature: int | None = 54
    power: int | None = 612_400  # milliwatts
    limit: int | None = 700_000
    load: int | None = 97
    reasons: int | None = 0
    links: dict[int, Any] = field(default_factory=dict)  # link → "switch", a Gpu, or None where it is down
    version: int = 6
    speed: int = 26_562  # MB/s
    capability: tuple[int, int] | None = (9, 0)

    @property
    def bus(self) -> bytes:
        return f"00000000:{self.index:02X}:00.0".encode()


class FakeNvml:
    """Plays the module `pynvml`. `asked` counts the calls for figures; `lost` makes every figure raise."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_TEMPERATURE_GPU = 0
    NVML_NVLINK_MAX_LINKS = 18
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 90

    def __init__(self, *gpus: Gpu, driver: bool = True) -> None:
        self.gpus = gpus
        self.driver = driver
        self.lost = False
        self.asked = 0

    def _told(self, figure: Any) -> Any:
        self.asked += 1
        if figure is None or self.lost:
            raise NVMLError("Not Supported")
        return figure

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> Gpu:
        return self._told(next((gpu for gpu in self.gpus if gpu.bus == bus), None))

    def nvmlDeviceGetIndex(self, gpu: Gpu) -> int:
        return gpu.index

    def nvmlDeviceGetName(self, gpu: Gpu) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return f"GPU-{gpu.index}"

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.capability is None:
            raise NVMLError("Not Supported")
        return gpu.capability

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Any:
        total, used = self._told(gpu.memory)
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        return self._told(gpu.temperature)

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        return self._told(gpu.power)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: Gpu) -> int:
        return self._told(gpu.limit)

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        return SimpleNamespace(gpu=self._told(gpu.load))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: Gpu) -> int:  # an older binding: no other name
        return self._told(gpu.reasons)

    def nvmlDeviceGetNvLinkState(self, gpu: Gpu, link: int) -> int:
        return self._told(None if link not in gpu.links else int(gpu.links[link] is not None))

    def nvmlDeviceGetNvLinkVersion(self, gpu: Gpu, link: int) -> int:
        return self._told(gpu.version)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: Gpu, link: int) -> int:
        return 2 if self._told(gpu.links[link]) == "switch" else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: Gpu, link: int) -> Any:
        return SimpleNamespace(busId=self._told(gpu.links[link]).bus)

    def nvmlDeviceGetFieldValues(self, gpu: Gpu, fields: list[int]) -> list[Any]:
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self._told(gpu.speed)))]
