"""What the hardware of a device tells, as it travels in a status report. A figure is None where it is not told."""

from __future__ import annotations

from msgspec import Struct, field


class Nvlink(Struct, frozen=True, kw_only=True):
    """The NVLinks of one GPU."""

    links: int  # that it has
    up: int  # of them
    generation: int | None = None  # 4 is that of an H100
    speed: float | None = None  # bytes per second of one link, each way
    peers: dict[str, int] = field(default_factory=dict)  # what they lead to, and how many: "cuda:1", "switch"


class DeviceStatus(Struct, frozen=True, kw_only=True):
    """One device the daemon owns. Figures are None where the hardware does not tell."""

    name: str  # "cuda:0", "cpu:1"
    model: str = ""  # "NVIDIA H200"
    uuid: str = ""
    memory_total: int | None = None  # bytes
    memory_used: int | None = None  # bytes, by all processes
    temperature: int | None = None  # degrees Celsius
    power: float | None = None  # watts
    utilization: int | None = None  # percent
    busy: bool = False  # a turn runs on it now
    power_limit: float | None = None  # watts that it may take
    throttled: tuple[str, ...] | None = None  # why its clock is not the highest; () is no reason
    nvlink: Nvlink | None = None  # None: it has none
    age: float | None = None  # seconds since these figures were read
