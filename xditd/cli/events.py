"""`xditctl events`: what happens to the daemon, its groups, runs and clients, as it happens."""

from __future__ import annotations

from datetime import datetime

import click
import msgspec
from rich.text import Text

from xditd.cli import words
from xditd.cli.commands import connect, endpoint_option, stdout
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Happened

_GOOD = {"serving", "group_ready"}
_BAD = {"group_failed"}
_WORRYING = {"draining", "stopping", "run_degraded", "load_degraded"}


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print each event as a JSON object on a line of its own."
)
@click.option("--kept", is_flag=True, help="Begin with those that the daemon has kept: the last 1024.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many; default: go on until Ctrl-C.")
@endpoint_option
def events(endpoint: str | None, as_json: bool, kept: bool, count: int | None) -> None:
    """Show what happens: groups, runs, clients, as they come and go.

    Status 3 when the daemon goes away.

    \b
    Examples:
      xditctl events
      xditctl events --kept --json | jq 'select(.event == "group_failed") | .message'
    """
    console = stdout()
    last: int | None = None

    def show(event: Happened) -> None:
        nonlocal last
        if last is not None and event.number > last + 1:
            missed = words.plural(event.number - last - 1, "event")
            if not as_json:  # there the numbers say it
                console.print(
                    f"         {words.WARNING} {missed} not kept: this reader is slow.", style="yellow"
                )
        last = event.number
        if as_json:
            click.echo(msgspec.json.encode(plain(event)))
        else:
            console.print(line(event), soft_wrap=True)

    with connect(endpoint, shared_memory=False) as client:
        if "watch" not in client.capabilities:
            raise XditError(
                Code.UNKNOWN_TYPE,
                f"This daemon ({client.daemon_version}) tells no events; restart it after an upgrade.",
            )
        heard = client.watch(show, after=0 if kept else None, count=count)
        if count is None:
            raise XditError(Code.DAEMON_LOST, f"The daemon has stopped; its last event was {heard}.")


def plain(event: Happened) -> dict[str, object]:
    """The event for programs: without what belongs to the exchange alone."""
    fields = msgspec.to_builtins(event)
    return {name: value for name, value in fields.items() if name not in ("re", "type")}


def line(event: Happened) -> Text:
    """`12:00:00 ✅ group g1 ready · diffusion_models/flux1-dev.safetensors`"""
    broken = event.event in _BAD or (event.event == "run_ended" and bool(event.code))
    mark, style = "  ", ""
    if event.event in _GOOD:
        mark, style = words.OK, "green"
    elif broken:
        mark, style = words.FAILED, "red"
    elif event.event in _WORRYING:
        mark, style = words.WARNING, "yellow"
    thing, _, what = event.event.partition("_")
    name = {"group": event.group, "run": "" if event.run is None else str(event.run)}.get(thing, "")
    said = " ".join(filter(None, [thing, name, what])) if what else f"daemon {thing}"
    facts = [
        words.model(event.model) if event.model is not None else "",
        f"generation {event.generation}" if event.generation > 1 else "",
        event.client,
        event.message,
        f"[{event.code}]" if event.code else "",
    ]
    text = Text.assemble(
        (datetime.fromtimestamp(event.time).strftime("%H:%M:%S"), "dim"), f" {mark} ", (said, style)
    )
    about = " · ".join(filter(None, facts))
    return text.append(f" · {_printable(about)}", style="dim") if about else text


def _printable(text: str) -> str:
    """A client's own words must not move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
