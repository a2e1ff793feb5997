"""`xditctl demo`: the whole path at once, with small models and a daemon of its own."""

from __future__ import annotations

import contextlib
import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from xditd.cli import words
from xditd.cli.bars import PhaseBar
from xditd.cli.commands import connect, endpoint_option, stderr, stdout
from xditd.cli.drawing import Wish, decode, draw
from xditd.cli.own_daemon import OwnDaemon
from xditd.cli.sample import PictureSize
from xditd.cli.status_view import status_view
from xditd.client import Client, files
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef, PlanRequest

RANKS = 2


@click.command()
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
@click.option("--steps", type=click.IntRange(1, 100), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 3), default=0, show_default=True)
@endpoint_option
def demo(endpoint: str | None, output: Path, size: tuple[int, int], steps: int, seed: int) -> None:
    """Draw a picture with two CPU ranks, from nothing.

    Needs no GPU, no model and no network.

    Makes small models in ComfyUI's file formats in a temporary folder, starts a daemon, samples through it with the
    sequence split over two ranks (ulysses 2), decodes, writes a PNG, stops the daemon and cleans up. The models'
    weights are random, so the picture is abstract noise.

    With --endpoint it uses a running daemon and the first Flux model and VAE that it lists.

    \b
    Example:
      xditctl demo --size 512x512 --steps 20 -o noise.png
    """
    wish = functools.partial(Wish, size=size, steps=steps, seed=seed)
    with _terminated():
        if endpoint:
            with connect(endpoint) as client:
                _show(client, wish, PlanRequest(), output)
            return
        with OwnDaemon(RANKS) as daemon:
            try:
                with _prepared(daemon) as client:
                    _show(client, wish, PlanRequest(ulysses=RANKS), output)
            except XditError:
                for line in daemon.log()[-12:]:
                    stderr().print(f"   {line}", style="dim", markup=False)
                raise
    stdout().print(f"{words.OK} The daemon is stopped, its ranks are gone, the temporary models are removed.")


def _prepared(daemon: OwnDaemon) -> Client:
    console = stdout()
    with stderr().status("making small models with random weights"):
        making = [sys.executable, "-m", "xditd.models.making", str(daemon.models)]
        made = subprocess.run(making, capture_output=True, text=True)
    if made.returncode:
        last = (made.stderr.strip().splitlines() or [f"ended with {made.returncode}"])[-1]
        raise XditError(Code.MODEL_FAILED, f"The small models could not be made: {last}.")
    bytes_made = sum(path.stat().st_size for path in daemon.models.rglob("*.safetensors"))
    console.print(
        f"{words.OK} Small models with random weights, in ComfyUI's formats: {words.size(bytes_made)}"
    )
    with stderr().status("starting a daemon"):
        daemon.start()
        client = daemon.connect()
    console.print(f"{words.OK} A daemon of its own: pid {daemon.pid}, {daemon.endpoint}", markup=False)
    return client


def _show(client: Client, wish: Callable[..., Wish], plan: PlanRequest, output: Path) -> None:
    console = stdout()
    flux, vae = _models(client)
    name = words.model(flux)
    with PhaseBar(stderr(), name) as bar:
        loaded = client.load(flux, plan, on_event=bar.on_event)
    where = f"{words.degrees(loaded.plan)} on {', '.join(loaded.plan.devices)}"
    console.print(f"{words.OK} {name} is ready after {words.duration(loaded.seconds)}: {where}", markup=False)
    wished = wish(model=flux, plan=plan)
    drawn = draw(client, wished, stderr())
    pace = words.duration(drawn.seconds / drawn.steps)
    console.print(
        f"{words.OK} {words.plural(drawn.steps, 'step')} in {words.duration(drawn.seconds)}, {pace} a step"
    )
    image = decode(client, vae, drawn.latent, stderr())
    files.write_png(output, image, {"Software": "xditd demo", "seed": str(wished.seed)})
    width, height = wished.size
    kind = "abstract noise, for the weights are random" if plan.ulysses else "from a random prompt"
    console.print(f"{words.OK} {output}: {width}×{height}, {kind}", markup=False, soft_wrap=True)
    console.print("\n[bold]$ xditctl status[/bold]")
    console.print(status_view(client.status()))
    console.print()


def _models(client: Client) -> tuple[ModelRef, ModelRef]:
    """The first Flux and the first VAE that the daemon lists.

    Raises:
        XditError: `model_not_visible` where it lacks one.
    """
    # Files of their own first.
    listed = sorted(client.models().models, key=lambda info: info.kind == "checkpoints")

    def first(family: str, what: str) -> ModelRef:
        info = next((info for info in listed if info.family == family), None)
        if info is None:
            raise XditError(
                Code.MODEL_NOT_VISIBLE,
                f"This daemon lists no {what}; `xditctl demo` without --endpoint brings its own.",
            )
        return ModelRef(kind=info.kind, name=info.name, part=info.part if info.kind == "checkpoints" else "")

    return first("flux", "Flux model"), first("autoencoder_kl", "VAE")


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
