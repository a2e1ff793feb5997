"""How a StatusReport looks on a terminal. Pure: a report in, a rich renderable out."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xditd.cli import words
from xditd.protocol.messages import (
    DeviceStatus,
    GroupStatus,
    RankStatus,
    RunStatus,
    StatusReport,
)

_STATE_STYLE = {
    "serving": "green",
    "ready": "green",
    "working": "cyan",
    "bound": "cyan",
    "starting": "yellow",
    "importing": "yellow",
    "joining": "yellow",
    "loading": "yellow",
    "queued": "yellow",
    "draining": "yellow",
    "leaving": "yellow",
    "stopping": "red",
    "failed": "bold red",
    "gone": "dim",
    "ended": "dim",
}


def status_view(report: StatusReport) -> RenderableType:
    """The daemon, then what it owns, holds and does; parts that are empty say so in a line."""
    return Group(
        _head(report),
        _titled("Devices", _devices(report.devices)),
        _titled("Groups", groups_view(report.groups)),
        _titled("Runs", runs_view(report.runs)),
        _titled("Shared memory", _arenas(report)),
    )


def groups_view(groups: Iterable[GroupStatus]) -> RenderableType:
    """Each group with its plan, and its ranks below it."""
    parts: list[RenderableType] = []
    for group in groups:
        parts += [_group_head(group), Padding(_group_body(group), (0, 0, 0, 2), expand=False)]
    return Group(*parts) if parts else _none("none; `xditctl load` or a run brings one up")


def runs_view(runs: Iterable[RunStatus]) -> RenderableType:
    """The open runs, the waiting ones with their place in the queue."""
    table = _table("run", "state", "model", "group", "step", "age", "client", "label")
    for run in runs:
        state = f"{run.state} ({run.position}.)" if run.position else run.state
        label = Text(run.label)
        if run.rebinds:
            label.append(f" {words.WARNING} moved {words.plural(run.rebinds, 'time')}", style="yellow")
        table.add_row(
            str(run.run),
            Text(state, style=_STATE_STYLE.get(run.state, "")),
            Text(run.model.name.rpartition("/")[2]),
            run.group or words.UNKNOWN,
            f"{run.step} of {run.total}" if run.total else str(run.step),
            words.duration(run.age),
            Text(run.client or words.UNKNOWN),
            label,
        )
    return table if table.row_count else _none("none")


def _head(report: StatusReport) -> Text:
    mark = {"serving": words.OK, "stopping": words.FAILED}.get(report.state, words.WARNING)
    facts = f" · up {words.duration(report.uptime)} · pid {report.pid} · epoch {report.epoch[:8]}"
    return Text.assemble(
        f"{mark} ",
        (f"xditd {report.version}", "bold"),
        " is ",
        (report.state, _STATE_STYLE.get(report.state, "bold")),
        (facts, "dim"),
    )


def _devices(devices: tuple[DeviceStatus, ...]) -> RenderableType:
    """What no device tells has no column: a CPU has no temperature here."""
    columns = {
        "device": [Text(device.name) for device in devices],
        "model": [Text(device.model) for device in devices],
        "memory used": [Text(words.share(device.memory_used, device.memory_total)) for device in devices],
        "": [_bar(device.memory_used, device.memory_total) for device in devices],
        "temp": [_figure(device.temperature, "°C") for device in devices],
        "power": [_figure(device.power, "W") for device in devices],
        "load": [_figure(device.utilization, "%") for device in devices],
        "turn": [_busy(device.busy) for device in devices],
    }
    told = {title: cells for title, cells in columns.items() if any(cell.plain for cell in cells)}
    table = _table(*told, right=("memory used", "temp", "power", "load"))
    for row in zip(*told.values(), strict=True):
        table.add_row(*(cell if cell.plain else words.UNKNOWN for cell in row))
    return table if devices else _none("none")


def _figure(value: float | None, unit: str) -> Text:
    return Text("" if value is None else f"{value:.0f} {unit}")


def _busy(busy: bool) -> Text:
    return Text("● working", style="cyan") if busy else Text("○ idle", style="dim")


def _group_head(group: GroupStatus) -> Text:
    kind = " ".join(filter(None, (group.family, group.variant, group.dtype)))
    return Text.assemble(
        (group.group, "bold"),
        "  ",
        (group.state, _STATE_STYLE.get(group.state, "")),
        f"  {words.model(group.model)}  ",
        (kind, "dim"),
    )


def _group_body(group: GroupStatus) -> RenderableType:
    life = [words.plural(group.runs, "run"), words.plural(group.turns, "turn")]
    if group.seconds is not None:
        life.append(f"ready in {words.duration(group.seconds)}")
    if group.generation > 1:
        life.append(f"generation {group.generation}")
    plan = f"{words.degrees(group.plan)} on {', '.join(group.plan.devices)}"
    parts: list[RenderableType] = [Text.assemble((plan, "bold"), (f" · {' · '.join(life)}", "dim"))]
    if group.plan.reason:
        parts.append(Text(group.plan.reason, style="dim"))
    if group.problem:
        parts.append(Text(f"{words.FAILED} {group.problem}", style="red"))
    if group.ranks:
        parts.append(_ranks(group.ranks))
    return Group(*parts)


def _ranks(ranks: tuple[RankStatus, ...]) -> Table:
    table = _table(
        "rank",
        "pid",
        "device",
        "phase",
        "device memory",
        "host memory",
        "attention",
        right=("pid", "device memory", "host memory"),
    )
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            str(rank.pid),
            rank.device,
            Text(rank.phase, style=_STATE_STYLE.get(rank.phase, "")),
            words.size(rank.device_memory),
            words.size(rank.rss),
            rank.attention or words.UNKNOWN,
        )
    return table


def _arenas(report: StatusReport) -> RenderableType:
    used = Text(f"{words.share(report.arena_bytes, report.arena_limit)}  ")
    used.append_text(_bar(report.arena_bytes, report.arena_limit))
    table = _table("client", "pid", "uid", "segments", "size", right=("pid", "uid", "segments", "size"))
    for arena in report.arenas:
        client = Text(arena.client or words.UNKNOWN)
        numbers = (str(arena.pid), str(arena.uid), str(arena.segments), words.size(arena.bytes))
        table.add_row(client, *numbers)
    return Group(used, table) if report.arenas else used


def _bar(used: int | None, total: int | None, width: int = 10) -> Text:
    """A gauge, red from nine tenths on."""
    if used is None or not total:
        return Text("")
    share = min(used / total, 1.0)
    filled = round(share * width) or (1 if used else 0)
    style = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
    return Text.assemble(("━" * filled, style), ("━" * (width - filled), "bright_black"))


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return table


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{title}", style="bold"), Padding(body, (0, 0, 0, 2), expand=False))


def _none(why: str) -> Text:
    return Text(why, style="dim")
