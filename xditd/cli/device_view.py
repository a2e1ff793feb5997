"""How devices look on a terminal: their figures, what slows them, what connects them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from xditd.cli import words
from xditd.cli.shapes import columns, gauge, none
from xditd.protocol.figures import DeviceStatus

HARMLESS = frozenset({"idle", "application_clocks", "sync_boost", "display_clocks"})
"""Reasons for a low clock that nobody has to do anything about."""

OLD = 5.0
"""Seconds after which figures are not those of now any more."""


def devices_view(devices: Sequence[DeviceStatus]) -> RenderableType:
    """A row for each device, then what connects them, and whether the figures are old."""
    if not devices:
        return none("none")
    parts: list[RenderableType] = [_figures(devices)]
    links = _links(devices)
    if links.plain:
        parts.append(links)
    oldest = max((device.age or 0.0 for device in devices), default=0.0)
    if oldest > OLD:
        parts.append(
            Text(
                f"{words.WARNING} These figures are {words.duration(oldest)} old: the driver does not answer.",
                style="yellow",
            )
        )
    return Group(*parts)


def _figures(devices: Sequence[DeviceStatus]) -> RenderableType:
    """What no device tells has no column: a CPU has no temperature here."""
    cells = {
        "device": [Text(device.name) for device in devices],
        "model": [Text(device.model) for device in devices],
        "memory used": [Text(words.share(device.memory_used, device.memory_total)) for device in devices],
        "": [gauge(device.memory_used, device.memory_total) for device in devices],
        "temp": [_figure(device.temperature, "°C") for device in devices],
        "power": [_power(device) for device in devices],
        "load": [_figure(device.utilization, "%") for device in devices],
        "slowed by": [_slowed(device) for device in devices],
        "turn": [_busy(device.busy) for device in devices],
    }
    told = {title: column for title, column in cells.items() if any(cell.plain for cell in column)}
    table = columns(*told, right=("memory used", "temp", "power", "load"))
    for row in zip(*told.values(), strict=True):
        table.add_row(*(cell if cell.plain else words.UNKNOWN for cell in row))
    return table


def _figure(value: float | None, unit: str) -> Text:
    return Text("" if value is None else f"{value:.0f} {unit}")


def _power(device: DeviceStatus) -> Text:
    if device.power is None or device.power_limit is None:
        return _figure(device.power, "W")
    return Text(f"{device.power:.0f} of {device.power_limit:.0f} W")


def _slowed(device: DeviceStatus) -> Text:
    """Only what a person may want to do something about: heat, power, hardware."""
    if device.throttled is None:
        return Text("")
    reasons = [reason.replace("_", " ") for reason in device.throttled if reason not in HARMLESS]
    return Text(", ".join(reasons), style="yellow") if reasons else Text("nothing", style="dim")


def _busy(busy: bool) -> Text:
    return Text("● working", style="cyan") if busy else Text("○ idle", style="dim")


def _links(devices: Sequence[DeviceStatus]) -> Text:
    """NVLinks, a line for all devices that have the same."""
    alike: dict[str, list[str]] = {}
    for device in devices:
        if device.name.startswith("cuda"):
            alike.setdefault(_link(device), []).append(device.name)
    return Text("\n".join(f"{', '.join(names)}: {what}" for what, names in alike.items()), style="dim")


def _link(device: DeviceStatus) -> str:
    links = device.nvlink
    if links is None:
        return "no NVLink"
    generation = "" if links.generation is None else f" {links.generation}"
    speed = "" if links.speed is None else f", {links.speed / 1e9:.1f} GB/s each way on each"
    peers = words.joined([f"{peer} ({count})" for peer, count in sorted(links.peers.items())])
    return f"NVLink{generation}, {links.up} of {links.links} links up{speed}" + (
        f", to {peers}" if peers else ""
    )
