"""The command: runs the checks, shows each as it is done, and sums up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xditd.cli import exits, words
from xditd.cli.commands import endpoint_option, json_option, print_json, stdout
from xditd.cli.doctor.check import Check
from xditd.cli.doctor.compute import compute_checks
from xditd.cli.doctor.daemon import daemon_checks
from xditd.cli.doctor.host import host_checks


@click.command()
@click.option("--quick", is_flag=True, help="Without torch and GPUs: a second instead of ten.")
@json_option
@endpoint_option
def doctor(endpoint: str | None, quick: bool, as_json: bool) -> None:
    """Check what xditd needs, with the cure of what lacks.

    Status 0 where nothing has failed; warnings are allowed.

    \b
    Examples:
      xditctl doctor
      xditctl doctor --json | jq -r '.[] | select(.state == "failed") | .cure'
    """
    parts: dict[str, Callable[[], Iterator[Check]]] = {"This machine": host_checks}
    if not quick:
        parts["Computing"] = compute_checks
    parts["Daemon"] = lambda: daemon_checks(endpoint)
    done: list[Check] = []
    console = stdout()
    for title, checks in parts.items():
        if as_json:
            done += checks()
            continue
        console.print(Text(f"{title}", style="bold"))
        done += _shown(console, checks())
        console.print()
    if as_json:
        print_json(done)
    else:
        console.print(summary(done))
    if any(check.state == "failed" for check in done):
        click.get_current_context().exit(exits.FAILED)


def _shown(console: Console, checks: Iterator[Check]) -> Iterator[Check]:
    while True:
        with console.status("[dim]checking"):
            check = next(checks, None)
        if check is None:
            return
        console.print(line(check))
        yield check


def line(check: Check) -> Padding:
    """Mark, component, what is there; below it the cure."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2, no_wrap=True)
    table.add_column(width=22)
    table.add_column(overflow="fold")
    style = {"ok": "", "warning": "yellow", "failed": "red"}[check.state]
    table.add_row(check.mark.strip(), check.component, Text(check.found, style=style))
    if check.cure:
        table.add_row("", "", Text(f"→ {check.cure}"))
    return Padding(table, (0, 0, 0, 1), expand=False)


def summary(checks: list[Check]) -> Text:
    counted = Counter(check.state for check in checks)
    mark = words.FAILED if counted["failed"] else words.WARNING if counted["warning"] else words.OK
    return Text(
        f"{mark} {counted['ok']} in order, {words.plural(counted['warning'], 'warning')}, "
        f"{words.plural(counted['failed'], 'failure')}."
    )
