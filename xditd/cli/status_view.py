"""How a StatusReport looks on a terminal. Pure: a report in, a rich renderable out."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xditd.cli import words
from xditd.cli.device_view import devices_view
from xditd.cli.shapes import STATE_STYLE, columns, gauge, none, titled
from xditd.protocol.figures import GroupStatus, RankStatus, RunStatus
from xditd.protocol.messages import StatusReport


def status_view(report: StatusReport) -> RenderableType:
    """The daemon, then what it owns, holds and does; parts that are empty say so in a line."""
    return Group(
        _head(report),
        titled("Devices", devices_view(report.devices)),
        titled("Groups", groups_view(report.groups)),
        titled("Runs", runs_view(report.runs)),
        titled("Shared memory", _arenas(report)),
    )


def groups_view(groups: Iterable[GroupStatus]) -> RenderableType:
    """Each group with its plan, and its ranks below it."""
    parts: list[RenderableType] = []
    for group in groups:
        parts += [_group_head(group), Padding(_group_body(group), (0, 0, 0, 2), expand=False)]
    return Group(*parts) if parts else none("none; `xditctl load` or a run brings one up")


def runs_view(runs: Iterable[RunStatus]) -> RenderableType:
    """The open runs, the waiting ones with their place in the queue."""
    table = columns("run", "state", "model", "group", "step", "age", "client", "label")
    for run in runs:
        state = f"{run.state} ({run.position}.)" if run.position else run.state
        label = Text(run.label)
        if run.degraded:
            label.append(f" {words.degraded(run.degraded)}", style="yellow")
        if run.rebinds:
            label.append(f" {words.WARNING} moved {words.plural(run.rebinds, 'time')}", style="yellow")
        table.add_row(
            str(run.run),
            Text(state, style=STATE_STYLE.get(run.state, "")),
            Text(run.model.name.rpartition("/")[2]),
            run.group or words.UNKNOWN,
            f"{run.step} of {run.total}" if run.total else str(run.step),
            words.duration(run.age),
            Text(run.client or words.UNKNOWN),
            label,
        )
    return table if table.row_count else none("none")


def _head(report: StatusReport) -> Text:
    mark = {"serving": words.OK, "stopping": words.FAILED}.get(report.state, words.WARNING)
    facts = f" · up {words.duration(report.uptime)} · pid {report.pid} · epoch {report.epoch[:8]}"
    slow: tuple[str, str] = ("", "")
    if report.nursery is not None and report.nursery.state == "ended":
        problem = report.nursery.problem
        slow = (f"\n{words.WARNING} Ranks start slowly: the nursery ended. {problem}.", "yellow")
    return Text.assemble(
        f"{mark} ",
        (f"xditd {report.version}", "bold"),
        " is ",
        (report.state, STATE_STYLE.get(report.state, "bold")),
        (facts, "dim"),
        slow,
    )


def _group_head(group: GroupStatus) -> Text:
    kind = " ".join(filter(None, (group.family, group.variant, group.dtype)))
    return Text.assemble(
        (group.group, "bold"),
        "  ",
        (group.state, STATE_STYLE.get(group.state, "")),
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
    if group.degraded:
        parts.append(Text(words.degraded(group.degraded), style="yellow"))
    if group.problem:
        parts.append(Text(f"{words.FAILED} {group.problem}", style="red"))
    if group.ranks:
        parts.append(_ranks(group.ranks))
    return Group(*parts)


def _ranks(ranks: tuple[RankStatus, ...]) -> Table:
    table = columns(
        "rank",
        "pid",
        "device",
        "phase",
        "weights",
        "device memory",
        "host memory",
        "attention",
        right=("pid", "weights", "device memory", "host memory"),
    )
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            str(rank.pid),
            rank.device,
            Text(rank.phase, style=STATE_STYLE.get(rank.phase, "")),
            words.size(rank.weights),
            words.size(rank.device_memory),
            words.size(rank.rss),
            rank.attention or words.UNKNOWN,
        )
    return table


def _arenas(report: StatusReport) -> RenderableType:
    used = Text(f"{words.share(report.arena_bytes, report.arena_limit)}  ")
    used.append_text(gauge(report.arena_bytes, report.arena_limit))
    table = columns("client", "pid", "uid", "segments", "size", right=("pid", "uid", "segments", "size"))
    for arena in report.arenas:
        client = Text(arena.client or words.UNKNOWN)
        numbers = (str(arena.pid), str(arena.uid), str(arena.segments), words.size(arena.bytes))
        table.add_row(client, *numbers)
    return Group(used, table) if report.arenas else used
