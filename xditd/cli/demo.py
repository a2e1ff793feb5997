"""`xditctl demo`: the whole path at once, with a small model that comes along and a daemon of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from xditd.cli import words
from xditd.cli.bars import PhaseBar
from xditd.cli.commands import connect, endpoint_option, stderr, stdout
from xditd.cli.drawing import Wish, decode, draw, show
from xditd.cli.models import plan_options
from xditd.cli.own_daemon import OwnDaemon
from xditd.cli.sample import PictureSize
from xditd.cli.status_view import status_view
from xditd.client import Client, files
from xditd.demo import conditioning, prompt
from xditd.protocol.errors import XditError
from xditd.protocol.messages import PlanRequest

RANKS = 2


@click.command()
@click.argument("text", metavar="[PROMPT]", default=prompt.EXAMPLE)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("xditd-demo.png"),
    show_default=True,
    help="PNG to write.",
)
@click.option(
    "--size", type=PictureSize(), default="256x256", show_default=True, help="Of the picture, in pixels."
)
@click.option("--steps", type=click.IntRange(1, 100), default=16, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 3), default=0, show_default=True)
@click.option(
    "--cfg",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1 the empty prompt is the negative; this model has its guidance built in.",
)
@plan_options
@endpoint_option
def demo(endpoint: str | None, text: str, output: Path, asked: PlanRequest, **wished: Any) -> None:
    """Draw what PROMPT says with two CPU ranks, from nothing.

    Needs no GPU, no network and no model but the one that comes along: it draws circles, squares, triangles, diamonds,
    stars and hearts in nine colours.

    Starts a daemon, encodes the prompt, samples with the sequence split over two ranks (ulysses 2, or as the options
    say), decodes, writes a PNG, stops the daemon and cleans up. With --endpoint it uses a running daemon that lists the
    demo's models.

    \b
    Examples:
      xditctl demo "a red circle left of a blue square"
      xditctl demo "three small yellow stars on a blue background" --seed 7 -o stars.png
      xditctl demo "a large pink heart" --pipefusion 2
    """
    prompt.tokens(text)  # a word that the model does not know is said before anything starts
    plan = asked if endpoint or asked != PlanRequest() else PlanRequest(ulysses=RANKS)
    wish = Wish(model=conditioning.FLUX, plan=plan, prompt=text, **wished)
    with _terminated():
        if endpoint:
            with connect(endpoint) as client:
                conditioning.expect(client)
                _show(client, wish, output)
            return
        with OwnDaemon(RANKS, prompt.folder()) as daemon:
            try:
                with _started(daemon) as client:
                    _show(client, wish, output)
            except XditError:
                for line in daemon.log()[-12:]:
                    stderr().print(f"   {line}", style="dim", markup=False)
                raise
    stdout().print(f"{words.OK} The daemon is stopped, and its ranks are gone.")


def _started(daemon: OwnDaemon) -> Client:
    console = stdout()
    with stderr().status("starting a daemon"):
        daemon.start()
        client = daemon.connect()
    console.print(f"{words.OK} A daemon of its own: pid {daemon.pid}, {daemon.endpoint}", markup=False)
    return client


def _show(client: Client, wish: Wish, output: Path) -> None:
    console = stdout()
    name = words.model(wish.model)
    with PhaseBar(stderr(), name) as bar:
        loaded = client.load(wish.model, wish.plan, on_event=bar.on_event)
    where = f"{words.degrees(loaded.plan)} on {', '.join(loaded.plan.devices)}"
    console.print(f"{words.OK} {name} is ready after {words.duration(loaded.seconds)}: {where}", markup=False)
    drawn = draw(client, wish, stderr())
    show(drawn, console)
    image = decode(client, conditioning.VAE, drawn.latent, stderr())
    notes = {"Software": "xditd demo", "prompt": wish.prompt or "", "seed": str(wish.seed)}
    files.write_png(output, image, notes)
    width, height = wish.size
    console.print(f"{words.OK} {output}: {width}×{height}, {wish.prompt}", markup=False, soft_wrap=True)
    console.print("\n[bold]$ xditctl status[/bold]")
    console.print(status_view(client.status()))
    console.print()


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """A polite kill, or a terminal that is closed, ends the demo as Ctrl-C does: with everything cleaned up."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
