"""`xditctl top`: the daemon at work, live."""

from __future__ import annotations

import time

import click
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from xditd.cli import words
from xditd.cli.commands import connect, endpoint_option, stdout
from xditd.cli.keys import Keys
from xditd.cli.top_view import top_view
from xditd.client import Client
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import StatusReport


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between frames.",
)
@click.option(
    "--once", is_flag=True, help="Print one frame and end; so it is where the output is no terminal."
)
@endpoint_option
def top(endpoint: str | None, interval: float, once: bool) -> None:
    """Watch devices, groups, runs and their progress, the queue and shared memory.

    q or Ctrl-C ends it. It outlives a restart of the daemon. For programs there is `xditctl status --json --watch`.

    \b
    Examples:
      xditctl top
      xditctl top --interval 0.2
      xditctl top --once | less
    """
    console = stdout()
    with connect(endpoint, shared_memory=False) as client:
        frames = Frames(client)
        if once or not console.is_terminal:
            console.print(top_view(client.status()))
            return
        with (
            Keys() as keys,
            Live(frames.next(), console=console, screen=True, auto_refresh=False) as live,
        ):
            end = time.monotonic() + interval
            while True:
                left = end - time.monotonic()
                if left <= 0:
                    live.update(frames.next(), refresh=True)
                    end = time.monotonic() + interval
                elif "q" in keys.pressed(left).lower():
                    return


class Frames:
    """One frame after the other, each with the pace since the one before."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._before: StatusReport | None = None

    def next(self) -> RenderableType:
        """The daemon now, or why there is none."""
        try:
            report = self.client.status()
        except XditError as error:
            if error.code not in (Code.DAEMON_LOST, Code.DAEMON_NOT_FOUND, Code.TIMEOUT):
                raise
            return Text(f"{words.FAILED} {error}\n   Trying again; q ends.", style="red")
        before, self._before = self._before, report
        return top_view(report, before)
