"""What a status report is to Prometheus: gauges, each with a bounded number of labels. Pure but for its import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xditd.daemon import states
from xditd.daemon.gauges import REASONS
from xditd.protocol.figures import DeviceStatus
from xditd.protocol.messages import StatusReport

Figure = Callable[[DeviceStatus], "float | None"]

DEVICE: dict[str, tuple[str, Figure]] = {
    "memory_used_bytes": ("Memory in use, by all processes.", lambda d: d.memory_used),
    "memory_total_bytes": ("Memory that it has.", lambda d: d.memory_total),
    "utilization_ratio": (
        "Share of the time in which it worked, 0 to 1.",
        lambda d: None if d.utilization is None else d.utilization / 100,
    ),
    "temperature_celsius": ("Temperature.", lambda d: d.temperature),
    "power_watts": ("Power that it draws.", lambda d: d.power),
    "power_limit_watts": ("Power that it may draw.", lambda d: d.power_limit),
    "nvlinks_up": ("NVLinks that are up.", lambda d: None if d.nvlink is None else d.nvlink.up),
    "nvlinks": ("NVLinks that it has.", lambda d: None if d.nvlink is None else d.nvlink.links),
    "busy": ("1 while a turn runs on it.", lambda d: float(d.busy)),
    "figures_age_seconds": ("Since its figures were read; a growing one tells of a driver that hangs.", lambda d: d.age),
}  # fmt: skip
"""By the name behind xditd_device_: what it is, and where a device has it. What is not told has no sample."""


def families(report: StatusReport | None, took: float) -> Iterator[Any]:
    """Every gauge.

    Args:
        report: None where the event loop did not answer: then the gauges have no samples.
        took: seconds that it took to answer.
    """
    from prometheus_client.core import GaugeMetricFamily

    def gauge(name: str, what: str, label: str, values: Mapping[str, float | None]) -> Any:
        family = GaugeMetricFamily(f"xditd_{name}", what, labels=[label] if label else [])
        for key, value in values.items():
            if value is not None:
                family.add_metric([key] if label else [], value)
        return family

    def one(name: str, what: str, figure: Callable[[StatusReport], float | None]) -> Any:
        return gauge(name, what, "", {"": figure(report) if report else None})

    answer = "Seconds that the event loop took to answer this scrape, or did not answer in."
    yield gauge("loop_answer_seconds", answer, "", {"": took})
    yield gauge("info", "1, with the daemon's version.", "version", {report.version: 1} if report else {})
    yield gauge("state", "1 for the state that the daemon is in.", "state", _state(report))
    yield one("uptime_seconds", "Since the daemon's start.", lambda r: r.uptime)
    yield one("clients", "Connected clients.", lambda r: r.clients)
    yield one("queue_length", "Runs that wait for a group.", lambda r: _runs(r)["queued"])
    yield gauge("runs", "Open runs, by state.", "state", _runs(report) if report else {})
    yield gauge("groups", "Groups, by state.", "state", _groups(report) if report else {})
    yield one("arena_bytes", "Shared memory of all clients.", lambda r: r.arena_bytes)
    yield one("arena_limit_bytes", "Shared memory that they may have.", lambda r: r.arena_limit)
    devices = report.devices if report else ()
    for name, (what, figure) in DEVICE.items():
        yield gauge(f"device_{name}", what, "device", {device.name: figure(device) for device in devices})
    slowed = GaugeMetricFamily(
        "xditd_device_throttled",
        "1 where the reason keeps the device from its full clock.",
        labels=["device", "reason"],
    )
    for device in devices:
        for reason in REASONS.values() if device.throttled is not None else ():
            slowed.add_metric([device.name, reason], float(reason in (device.throttled or ())))
    yield slowed


def _state(report: StatusReport | None) -> dict[str, float | None]:
    return {s: float(s == report.state) for s in _all(states.DAEMON)} if report else {}


def _runs(report: StatusReport) -> dict[str, float | None]:
    counted = Counter(run.state for run in report.runs)
    return {state: counted[state] for state in _all(states.RUN) if state not in states.RUN_OVER}


def _groups(report: StatusReport) -> dict[str, float | None]:
    counted = Counter(group.state for group in report.groups)
    return {state: counted[state] for state in _all(states.GROUP)}


def _all(table: states.Table) -> list[str]:
    """Every state of a table: those that nothing is in are told as 0."""
    return list(dict.fromkeys([*(state for state, _ in table), *table.values()]))
