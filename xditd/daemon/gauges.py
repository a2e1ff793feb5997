"""What the hardware tells of the devices: read by a thread of its own, since NVML may take its time, or hang with a
GPU that has fallen off the bus. Whoever asks gets the last figures and how old they are, and never waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
from msgspec import structs

from xditd.daemon.devices import Device
from xditd.protocol.figures import DeviceStatus, Nvlink

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks."""

LINKS_EVERY = 10
"""Looks from one at the NVLinks to the next: they are many, and change when a cable is pulled."""

REASONS = {
    0x001: "idle",
    0x002: "application_clocks",
    0x004: "power_cap",
    0x008: "hardware_slowdown",
    0x010: "sync_boost",
    0x020: "software_thermal",
    0x040: "hardware_thermal",
    0x080: "power_brake",
    0x100: "display_clocks",
}
"""Why NVML says that a GPU does not run at its full clock (nvmlClocksEventReason…), in our words."""

GENERATIONS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5, 8: 6}
"""NVLink's generation by NVML's number of its version (NVML_NVLINK_VERSION_…: 2.0, 2.2, 3.0, 3.1 count on)."""


class Gauges:
    """The last figures of each device."""

    def __init__(self, devices: Sequence[Device], interval: float = INTERVAL) -> None:
        self.devices = tuple(devices)
        self.interval = interval
        self._links: dict[str, Nvlink | None] = {}
        self._looks = 0
        self._figures = tuple(DeviceStatus(name=device.name, model=device.model) for device in devices)
        self._looked: float | None = None  # monotonic seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="gauges", daemon=True)

    def start(self) -> None:
        """Looks once, so that there are figures from the beginning, and then again and again until `close`."""
        self.look()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. One that hangs in NVML is left to the end of the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self.interval)

    def status(self, busy: set[str], now: float) -> tuple[DeviceStatus, ...]:
        """The figures as they were last seen.

        Args:
            busy: names of devices that a turn runs on.
            now: monotonic seconds.
        """
        age = None if self._looked is None else round(max(0.0, now - self._looked), 3)
        return tuple(
            structs.replace(figures, busy=figures.name in busy, age=age) for figures in self._figures
        )

    def look(self) -> None:
        """Reads every device once."""
        with_links = self._looks % LINKS_EVERY == 0
        self._looks += 1
        figures = []
        for device in self.devices:
            if device.handle is None:
                figures.append(_of_cpu(device))
                continue
            if with_links:
                self._links[device.name] = _links(device.handle)
            figures.append(_of_gpu(device, self._links.get(device.name)))
        self._figures, self._looked = tuple(figures), time.monotonic()

    def _keep_looking(self) -> None:
        failed = False
        while not self._stop.wait(self.interval):
            try:
                self.look()
            # A figure that cannot be read must not end the thread: the age of the last ones tells of it.
            except Exception:
                if not failed:
                    log.exception("The devices' figures cannot be read; trying on.")
                failed = True
            else:
                failed = False


def _of_cpu(device: Device) -> DeviceStatus:
    """The memory is the machine's: its CPU stands for several devices."""
    memory = psutil.virtual_memory()
    return DeviceStatus(
        name=device.name,
        model=device.model,
        memory_total=memory.total,
        memory_used=memory.total - memory.available,
    )


def _of_gpu(device: Device, links: Nvlink | None) -> DeviceStatus:
    import pynvml as nv

    handle = device.handle
    memory = _told("nvmlDeviceGetMemoryInfo", handle)
    rates = _told("nvmlDeviceGetUtilizationRates", handle)
    return DeviceStatus(
        name=device.name,
        model=device.model,
        uuid=device.uuid,
        memory_total=int(memory.total) if memory is not None else None,
        memory_used=int(memory.used) if memory is not None else None,
        temperature=_told("nvmlDeviceGetTemperature", handle, nv.NVML_TEMPERATURE_GPU),
        power=_watts(_told("nvmlDeviceGetPowerUsage", handle)),
        power_limit=_watts(_told("nvmlDeviceGetEnforcedPowerLimit", handle)),
        utilization=int(rates.gpu) if rates is not None else None,
        throttled=_reasons(handle),
        nvlink=links,
    )


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _reasons(handle: Any) -> tuple[str, ...] | None:
    # The name was changed; bindings and drivers know the old one, the new one, or both.
    bits = _told("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if bits is None:
        bits = _told("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    if bits is None:
        return None
    return tuple(reason for bit, reason in REASONS.items() if bits & bit)


def _links(handle: Any) -> Nvlink | None:
    """The NVLinks of a GPU together; None where it has none."""
    import pynvml as nv

    states = [
        (link, state)
        for link in range(nv.NVML_NVLINK_MAX_LINKS)
        if (state := _told("nvmlDeviceGetNvLinkState", handle, link)) is not None
    ]
    if not states:
        return None
    up = [link for link, state in states if state]
    peers: dict[str, int] = {}
    for link in up:
        peer = _peer(handle, link)
        peers[peer] = peers.get(peer, 0) + 1
    version = _told("nvmlDeviceGetNvLinkVersion", handle, up[0] if up else states[0][0])
    return Nvlink(
        links=len(states),
        up=len(up),
        generation=GENERATIONS.get(version or 0),
        speed=_speed(handle) if up else None,
        peers=peers,
    )


def _peer(handle: Any, link: int) -> str:
    """What is at the other end of a link: "cuda:1", "switch", the PCI address of something else, or "unknown"."""
    import pynvml as nv

    kind = _told("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
    if kind == nv.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return "switch"
    place = _told("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
    if place is None:
        return "unknown"
    bus = place.busId.decode() if isinstance(place.busId, bytes) else str(place.busId)
    other = _told("nvmlDeviceGetHandleByPciBusId", place.busId)
    index = None if other is None else _told("nvmlDeviceGetIndex", other)
    return bus if index is None else f"cuda:{index}"


def _speed(handle: Any) -> float | None:
    """Bytes per second of one link, each way."""
    import pynvml as nv

    values = _told("nvmlDeviceGetFieldValues", handle, [nv.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if not values or values[0].nvmlReturn != nv.NVML_SUCCESS or not values[0].value.uiVal:
        return None
    return values[0].value.uiVal * 1e6


def _told(name: str, *arguments: Any) -> Any:
    """What NVML answers, or None: many figures are not told by many cards, drivers and bindings."""
    import pynvml

    ask: Callable[..., Any] | None = getattr(pynvml, name, None)
    if ask is None:
        return None
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None
