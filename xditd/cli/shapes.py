"""The shapes that what is shown of a daemon is made of: tables, gauges, headings, the colours of states. Pure."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

STATE_STYLE = {
    "serving": "green",
    "ready": "green",
    "working": "cyan",
    "bound": "cyan",
    "starting": "yellow",
    "importing": "yellow",
    "joining": "yellow",
    "loading": "yellow",
    "queued": "yellow",
    "dozing": "blue",
    "asleep": "blue",
    "waking": "yellow",
    "draining": "yellow",
    "leaving": "yellow",
    "stopping": "red",
    "failed": "bold red",
    "gone": "dim",
    "ended": "dim",
}


def gauge(used: int | None, total: int | None, width: int = 10) -> Text:
    """A gauge, red from nine tenths on."""
    if used is None or not total:
        return Text("")
    share = min(used / total, 1.0)
    filled = round(share * width) or (1 if used else 0)
    style = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
    return Text.assemble(("━" * filled, style), ("━" * (width - filled), "bright_black"))


def columns(*titles: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table under these titles."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 1, 0, 0)
    )
    for title in titles:
        table.add_column(title, overflow="fold", justify="right" if title in right else "left")
    return table


def titled(title: str, body: RenderableType) -> RenderableType:
    """A part of a report under its heading."""
    return Group(Text(f"\n{title}", style="bold"), Padding(body, (0, 0, 0, 2), expand=False))


def none(why: str) -> Text:
    """What stands where there is nothing."""
    return Text(why, style="dim")
