"""The parts of a status report that stand for themselves: devices, groups and their ranks, runs, arenas, models to preload.

A figure is None where the hardware does not tell it.
"""

from __future__ import annotations

from msgspec import Struct, field

from xditd.protocol.plans import ModelRef, Plan


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


class RankStatus(Struct, frozen=True, kw_only=True):
    """One rank process."""

    rank: int
    pid: int
    device: str
    phase: str  # "starting", "importing", "joining", "loading", "ready", "asleep", "gone"
    rss: int | None = None  # bytes of host memory
    device_memory: int | None = None  # bytes that torch reserves on its device
    attention: str = ""  # attention backend
    weights: int | None = None  # bytes of the model's parameters that it holds on its device, in a turn
    host_weights: int = 0  # bytes of them that wait in the host's memory (`Plan.offload`)


class GroupStatus(Struct, frozen=True, kw_only=True):
    """One group of ranks."""

    group: str
    generation: int
    state: str
    model: ModelRef
    family: str
    variant: str
    dtype: str
    plan: Plan
    ranks: tuple[RankStatus, ...]
    runs: int = 0
    turns: int = 0  # turns answered since it was ready
    seconds: float | None = None  # it took to become ready
    problem: str = ""  # why it failed, where it did
    degraded: str = ""  # the plan that it stands in for, and why


class RunStatus(Struct, frozen=True, kw_only=True):
    """One run."""

    run: int
    state: str
    model: ModelRef
    group: str = ""
    label: str = ""
    client: str = ""
    step: int = 0
    total: int = 0  # 0 where the client drives the steps
    position: int = 0  # in the queue; 0 is running
    age: float = 0.0  # seconds
    rebinds: int = 0
    priority: int = 0
    degraded: str = ""  # why it is not done as asked; "" where it is


class ArenaStatus(Struct, frozen=True, kw_only=True):
    """The shared memory of one client."""

    client: str
    pid: int
    uid: int
    segments: int
    bytes: int


class MemoryStatus(Struct, frozen=True, kw_only=True):
    """The memory of one device, before or after something was ended. Figures are None where the hardware does not tell."""

    device: str
    total: int | None  # bytes
    used: int | None  # bytes, by all processes
    models: int  # bytes that the daemon counts for the models on it


class NurseryStatus(Struct, frozen=True, kw_only=True):
    """The process that ranks are forked from."""

    state: str  # "off", "importing", "warm", "ended"
    pid: int = 0  # 0: there was none
    seconds: float | None = None  # that its imports took; None before it is warm
    problem: str = ""  # why it has ended


class PreloadStatus(Struct, frozen=True, kw_only=True):
    """A model that the configuration wants ready."""

    model: ModelRef
    state: str  # "waiting", "ready", "refused": what became of it at the start
    code: str = ""  # why it was refused
    message: str = ""
