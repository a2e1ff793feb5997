"""`xditctl runs`, `cancel` and `drain`: what is under way, and how it ends."""

from __future__ import annotations

import click

from xditd.cli import words
from xditd.cli.commands import connect, endpoint_option, json_option, print_json, stderr, stdout
from xditd.cli.status_view import runs_view


@click.command()
@json_option
@endpoint_option
def runs(endpoint: str | None, as_json: bool) -> None:
    """List the open runs of all clients.

    \b
    Examples:
      xditctl runs
      xditctl runs --json | jq '.[] | select(.state == "queued") | .run'
    """
    with connect(endpoint, shared_memory=False) as client:
        report = client.status()
    if as_json:
        print_json(report.runs)
    else:
        stdout().print(runs_view(report.runs))


@click.command()
@click.argument("run", type=click.IntRange(min=0))
@endpoint_option
def cancel(endpoint: str | None, run: int) -> None:
    """End RUN.

    At once if it waits, after the step that it is in otherwise.

    \b
    Example:
      xditctl cancel 17
    """
    with connect(endpoint, shared_memory=False) as client:
        client.cancel(run)
    stdout().print(f"{words.OK} Run {run} is cancelled.")


@click.command()
@click.option("--stop", is_flag=True, help="Then stop the daemon.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), help="Seconds to wait for the open runs; default: for ever."
)
@endpoint_option
def drain(endpoint: str | None, stop: bool, timeout: float | None) -> None:
    """Take no new runs, and wait for the open ones.

    \b
    Examples:
      xditctl drain --stop
      xditctl drain --timeout 60
    """
    with connect(endpoint, shared_memory=False) as client:
        open_runs = len(client.status().runs)
        if open_runs:
            stderr().print(f"   Waiting for {words.plural(open_runs, 'run')}.")
        client.drain(stop=stop, timeout=timeout)
    stdout().print(f"{words.OK} Drained{': the daemon stops' if stop else '; it takes no new runs'}.")
