"""How a frame of `xditctl top` looks."""

from __future__ import annotations

import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from tests.cli import reports
from xditd.cli.top_view import top_view
from xditd.protocol.messages import StatusReport


def drawn(report: StatusReport, before: StatusReport | None = None, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(top_view(report, before))
    return console.file.getvalue()


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_a_frame_has_devices_groups_runs_queue_and_arenas():
    text = drawn(reports.report(clients=2))
    assert "2 clients · 2 runs open, 1 at work, 1 waiting" in text
    assert "NVLink 4" in text
    assert "48.0 GiB" in row(text, "g3"), "of both ranks together"
    assert "━" * 16 in row(text, "17")
    assert "12 of 28" in row(text, "17")
    assert "script" in row(text, "2."), "the one that waits has its place, and is not among the runs"
    assert "Rank 0 ran out of memory" in text
    assert "ComfyUI 0.3.64 128 MiB" in text


def test_an_idle_daemon_says_so_in_every_part():
    text = drawn(reports.empty_report())
    assert text.count("none") >= 4
    assert "empty" in text


def test_the_pace_is_what_moved_since_the_frame_before():
    before = reports.report()
    groups = (replace(before.groups[0], turns=294), before.groups[1])
    after = reports.report(uptime=before.uptime + 4, groups=groups)
    assert "2.5/s" in row(drawn(after, before), "g3")
    assert "–" in row(drawn(after), "g3"), "the first frame has none"


@pytest.mark.parametrize("change", ["epoch", "generation"])
def test_a_restart_between_two_frames_is_no_pace(change):
    before = reports.report()
    after = reports.report(uptime=before.uptime + 4)
    if change == "epoch":
        after = replace(after, epoch="another")
    else:
        after = replace(after, groups=(replace(after.groups[0], generation=9),))
    assert "/s" not in row(drawn(after, before), "g3")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_frame_fits_its_terminal(width):
    assert max(map(len, drawn(reports.report(), width=width).splitlines())) <= width
