"""How `xditctl top` looks: one frame of a daemon at work. Pure: reports in, a rich renderable out."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from xditd.cli import words
from xditd.cli.device_view import devices_view
from xditd.cli.shapes import STATE_STYLE, columns, gauge, none, titled
from xditd.protocol.figures import GroupStatus, RunStatus
from xditd.protocol.messages import StatusReport

BAR = 16
"""Characters of a run's progress."""


def top_view(report: StatusReport, before: StatusReport | None = None) -> RenderableType:
    """A frame.

    Args:
        before: the report of the frame before, for what has moved since; None shows no pace.
    """
    waiting = [run for run in report.runs if run.state == "queued"]
    under_way = [run for run in report.runs if run.state != "queued"]
    return Group(
        _head(report, len(waiting)),
        titled("Devices", devices_view(report.devices)),
        titled("Groups", _groups(report, before)),
        titled("Runs", _runs(under_way)),
        titled("Queue", _queue(waiting)),
        titled("Shared memory", _arenas(report)),
    )


def _head(report: StatusReport, waiting: int) -> Text:
    mark = {"serving": words.OK, "stopping": words.FAILED}.get(report.state, words.WARNING)
    working = sum(run.state == "working" for run in report.runs)
    facts = [
        f"up {words.duration(report.uptime)}",
        words.plural(report.clients, "client"),
        f"{words.plural(len(report.runs), 'run')} open, {working or 'none'} at work, {waiting or 'none'} waiting",
    ]
    return Text.assemble(
        f"{mark} ",
        (f"xditd {report.version}", "bold"),
        " is ",
        (report.state, STATE_STYLE.get(report.state, "bold")),
        (f" · {' · '.join(facts)}", "dim"),
    )


def _groups(report: StatusReport, before: StatusReport | None) -> RenderableType:
    table = columns(
        "group", "state", "model", "plan", "runs", "steps", "pace", "memory",
        right=("runs", "steps", "pace", "memory"),
    )  # fmt: skip
    for group in report.groups:
        state = Text(group.state, style=STATE_STYLE.get(group.state, ""))
        if group.generation > 1:
            state.append(f" ({group.generation}.)", style="dim")
        table.add_row(
            Text(group.group, style="bold"),
            state,
            Text(f"{group.model.name.rpartition('/')[2]} {group.dtype}"),
            Text(f"{words.degrees(group.plan)} on {', '.join(group.plan.devices)}"),
            str(group.runs),
            str(group.turns),
            _pace(group, report, before),
            words.size(_memory(group)),
        )
        if group.problem:
            table.add_row("", "", Text(f"{words.FAILED} {group.problem}", style="red"))
    return table if table.row_count else none("none; `xditctl load` or a run brings one up")


def _pace(group: GroupStatus, report: StatusReport, before: StatusReport | None) -> str:
    """Steps per second since the frame before."""
    if before is None or before.epoch != report.epoch or report.uptime <= before.uptime:
        return words.UNKNOWN
    same = [g for g in before.groups if (g.group, g.generation) == (group.group, group.generation)]
    if not same:
        return words.UNKNOWN
    return f"{(group.turns - same[0].turns) / (report.uptime - before.uptime):.1f}/s"


def _memory(group: GroupStatus) -> int | None:
    """What its ranks hold: of their devices where these tell, else of the host."""
    for told in ([r.device_memory for r in group.ranks], [r.rss for r in group.ranks]):
        known = [part for part in told if part is not None]
        if known:
            return sum(known)
    return None


def _runs(runs: list[RunStatus]) -> RenderableType:
    table = columns(
        "run", "state", "model", "group", "progress", "", "age", "client", "label", right=("age",)
    )
    for run in runs:
        label = Text(run.label)
        if run.rebinds:
            label.append(f" {words.WARNING} moved {words.plural(run.rebinds, 'time')}", style="yellow")
        table.add_row(
            str(run.run),
            Text(run.state, style=STATE_STYLE.get(run.state, "")),
            Text(run.model.name.rpartition("/")[2]),
            run.group or words.UNKNOWN,
            _progress(run),
            f"{run.step} of {run.total}" if run.total else "",
            words.duration(run.age),
            Text(run.client or words.UNKNOWN),
            label,
        )
    return table if table.row_count else none("none")


def _progress(run: RunStatus) -> Text:
    """Of a sample; where the client drives the steps nobody here knows how many there are."""
    if not run.total:
        return Text("step by step" if run.state == "working" else "", style="dim")
    filled = round(run.step / run.total * BAR)
    return Text.assemble(("━" * filled, "cyan"), ("━" * (BAR - filled), "bright_black"))


def _queue(runs: list[RunStatus]) -> RenderableType:
    table = columns("place", "run", "model", "age", "client", "label", right=("age",))
    for run in sorted(runs, key=lambda run: run.position):
        table.add_row(
            f"{run.position + 1}.",
            str(run.run),
            Text(run.model.name.rpartition("/")[2]),
            words.duration(run.age),
            Text(run.client or words.UNKNOWN),
            Text(run.label),
        )
    return table if table.row_count else none("empty")


def _arenas(report: StatusReport) -> RenderableType:
    used = Text(f"{words.share(report.arena_bytes, report.arena_limit)}  ")
    used.append_text(gauge(report.arena_bytes, report.arena_limit))
    by_client = " · ".join(
        f"{arena.client or f'pid {arena.pid}'} {words.size(arena.bytes)}"
        for arena in sorted(report.arenas, key=lambda arena: -arena.bytes)
    )
    return Group(used, Text(by_client, style="dim")) if by_client else used
