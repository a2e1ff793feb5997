"""`xditctl status` and `xditctl wait-ready`: what the daemon is, and whether it serves."""

from __future__ import annotations

import time

import click
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from xditd.cli import words
from xditd.cli.commands import MODEL, connect, endpoint_option, json_option, print_json, stdout
from xditd.cli.status_view import status_view
from xditd.client import Client
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef

LOADED = frozenset({"ready", "dozing", "asleep", "waking"})
"""States of a group that a run need not load: one that sleeps wakes for it."""


@click.command()
@json_option
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between."
)
@endpoint_option
def status(endpoint: str | None, as_json: bool, watch: bool, interval: float) -> None:
    """Show devices, groups, ranks, runs and shared memory.

    \b
    Examples:
      xditctl status
      xditctl status --watch
      xditctl status --json | jq '.groups[].ranks[].pid'
    """
    with connect(endpoint, shared_memory=False) as client:
        if as_json:
            while True:
                print_json(client.status())
                if not watch:
                    return
                time.sleep(interval)
        console = stdout()
        if not watch:
            console.print(status_view(client.status()))
            return
        with Live(_now(client), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(_now(client), refresh=True)


def _now(client: Client) -> RenderableType:
    """The status, or why there is none: a watcher outlives the daemon."""
    try:
        return status_view(client.status())
    except XditError as error:
        if error.code not in (Code.DAEMON_LOST, Code.DAEMON_NOT_FOUND, Code.TIMEOUT):
            raise
        return Text(f"{words.FAILED} {error}\n   Trying again.", style="red")


@click.command("wait-ready")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds to wait."
)
@click.option("--model", type=MODEL, help='Wait also for a ready group of this model, "kind/name".')
@endpoint_option
def wait_ready(endpoint: str | None, timeout: float, model: ModelRef | None) -> None:
    """Wait until the daemon serves and the models that its configuration preloads are ready.

    \b
    Exit status:
      0 it serves, and they are      1 a model to preload was refused: waiting would not help
      5 it took too long             2 wrong command line   130 Ctrl-C

    \b
    Examples:
      xditctl wait-ready && python my_script.py
      xditctl wait-ready --timeout 600 --model diffusion_models/flux1-dev.safetensors
    """
    end = time.monotonic() + timeout
    missing = "no daemon answers"
    while True:
        left = end - time.monotonic()
        try:
            with connect(endpoint, shared_memory=False, timeout=max(0.0, min(left, 5.0))) as client:
                while True:
                    missing = _missing(client, model)
                    if not missing:
                        stdout().print(f"{words.OK} xditd {client.daemon_version} is ready.")
                        return
                    _pause(end, missing)
        except XditError as error:
            if error.code not in (Code.DAEMON_NOT_FOUND, Code.DAEMON_LOST, Code.STOPPING, Code.TIMEOUT):
                raise
            if error.code != Code.TIMEOUT:  # else what was missing before is what a person wants to know
                missing = error.message
        _pause(end, missing)


def _missing(client: Client, model: ModelRef | None) -> str:
    report = client.status()
    if report.state != "serving":
        loading = [words.model(preload.model) for preload in report.preloads if preload.state == "waiting"]
        still = f", {words.joined(loading)} not ready" if loading else ""
        return f"the daemon is {report.state}{still}"
    there = {(group.model.kind, group.model.name) for group in report.groups if group.state in LOADED}
    for preload in report.preloads:
        if preload.state == "refused" and (preload.model.kind, preload.model.name) not in there:
            raise XditError(
                Code.MODEL_FAILED, f"{words.model(preload.model)} is not there: {preload.message}"
            )
    if model is None:
        return ""
    states = [
        group.state
        for group in report.groups
        if (group.model.kind, group.model.name) == (model.kind, model.name)
    ]
    if not LOADED.isdisjoint(states):
        return ""
    return (
        f"{words.model(model)} is {words.joined(states)}"
        if states
        else f"nobody has loaded {words.model(model)}"
    )


def _pause(end: float, missing: str) -> None:
    if time.monotonic() >= end:
        raise XditError(Code.TIMEOUT, f"Not ready in time: {missing.rstrip('.')}.")
    time.sleep(0.2)
