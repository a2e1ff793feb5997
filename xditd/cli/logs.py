"""`xditctl logs`: what the daemon has logged, wherever it logs to."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

from xditd.cli import journal
from xditd.cli.commands import connect, endpoint_option, stderr
from xditd.protocol.errors import Code, XditError

PAUSE = 0.2
"""Seconds between two looks at a file."""


@click.command()
@click.option(
    "-n", "--lines", type=click.IntRange(0, 1_000_000), default=100, show_default=True, help="To begin with."
)
@click.option(
    "-f/-F", "--follow/--no-follow", default=None, help="Go on with what comes. Default: on a terminal, yes."
)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A log file, instead of looking for one.",
)
@endpoint_option
def logs(endpoint: str | None, lines: int, follow: bool | None, file: Path | None) -> None:
    """Show the daemon's log: the journal of its unit, or the file that it writes to.

    Where it looks is said on standard error. Without a daemon it is the journal of the unit that is installed.

    \b
    Examples:
      xditctl logs
      xditctl logs --no-follow -n 1000 | grep ❌
      xditctl logs --file /var/log/xditd.log
    """
    place = journal.Log(str(file), path=file) if file is not None else find(endpoint)
    stderr().print(f"Looking at {place.what}.", style="dim", markup=False, soft_wrap=True)
    following = sys.stdout.isatty() if follow is None else follow
    if place.path is None:
        done = subprocess.run(place.command(lines, follow=following))
        if done.returncode:
            raise XditError(
                Code.NOT_PERMITTED, "journalctl failed; `sudo -v` or the group systemd-journal may help."
            )
        return
    if not following:
        click.echo(place.last(lines), nl=False)
        return
    try:
        for line in journal.follow(place.path, lines):
            if line:
                click.echo(line, nl=False)
            else:
                time.sleep(PAUSE)
    except OSError as error:
        raise XditError(Code.NOT_PERMITTED, f"{place.path} cannot be read: {error.strerror}.") from error


def find(endpoint: str | None) -> journal.Log:
    """The log of the daemon that answers, else that of an installed unit.

    Raises:
        XditError: there is neither, or it cannot be followed.
    """
    try:
        with connect(endpoint, shared_memory=False, timeout=1.0) as client:
            pid = client.status().pid
    except XditError as error:
        if error.code not in (Code.DAEMON_NOT_FOUND, Code.TIMEOUT, Code.DAEMON_LOST):
            raise
        unit = journal.of_unit() if endpoint is None else None
        if unit is None:
            raise
        return unit
    return journal.of_daemon(pid)
