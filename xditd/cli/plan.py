"""`xditctl plan`: how a model would run, and why not otherwise. Nothing is loaded."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.text import Text

from xditd.cli import exits, words
from xditd.cli.commands import MODEL, connect, endpoint_option, json_option, print_json, stdout
from xditd.cli.models import DTYPES, names, plan_options
from xditd.cli.sample import PictureSize
from xditd.cli.shapes import columns
from xditd.protocol.errors import XditError
from xditd.protocol.explaining import Explained
from xditd.protocol.messages import ModelRef, PlanRequest

BASIS = {"measured": "green", "estimate": "dim"}

STYLE = {"chosen": "green", "possible": "", "rejected": "dim"}


@click.command()
@click.argument("model", type=MODEL)
@click.option("--gpus", metavar="0-3", help="The same as --devices.")
@click.option(
    "--size",
    type=PictureSize(),
    help="Of the picture, in pixels: tells the tokens of each rank, and the time of a step.",
)
@plan_options
@click.option("--dtype", type=DTYPES, help="Compute dtype; default: the file's own.")
@json_option
@endpoint_option
def plan(
    endpoint: str | None,
    model: ModelRef,
    gpus: str | None,
    size: tuple[int, int] | None,
    asked: PlanRequest,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Show which plan MODEL would have, and every other with the reason against it.

    With the bytes of weights that each rank holds, those that are set aside for activations, and, where --size is given, the
    time of a step: measured under that plan by this daemon, calibrated by a step under another, or an estimate of the model of
    costs in docs/scaling.md.

    Status 4 where the request would be refused.

    \b
    Examples:
      xditctl plan diffusion_models/flux1-dev.safetensors --gpus 0-3 --size 1024x1024
      xditctl plan diffusion_models/sd3.5_large.safetensors --strategy Tensor --json
    """
    model = msgspec.structs.replace(model, dtype=dtype or "")
    if gpus:
        asked = msgspec.structs.replace(asked, devices=names(gpus))
    with connect(endpoint, shared_memory=False) as client:
        answer = client.explain(model, asked, size or (0, 0))
    if as_json:
        print_json(answer)
    else:
        _show(answer, stdout())
    if answer.code:
        click.get_current_context().exit(exits.status_of(XditError(answer.code, answer.message)))


def _step(seconds: float | None) -> str:
    if seconds is None or seconds >= 1:
        return words.duration(seconds)
    return f"{seconds * 1000:.3g} ms"


def _show(answer: Explained, console: Console) -> None:
    numbers = ("weights", "activations", "tokens", "a step")
    table = columns("plan", "devices", "", *numbers, "", "why", right=numbers)
    for one in answer.candidates:
        table.add_row(
            words.degrees(one.plan),
            str(len(one.plan.devices)),
            Text(one.verdict, style=STYLE.get(one.verdict, "")),
            words.size(one.weights),
            words.size(one.activations),
            str(one.tokens or words.UNKNOWN),
            _step(one.seconds),
            Text(one.basis, style=BASIS.get(one.basis, "")),
            Text(one.reason, style="" if one.verdict == "chosen" else "dim"),
        )
    console.print(table)
    if answer.code:
        console.print(f"{words.FAILED} {answer.message}", style="red", markup=False, soft_wrap=True)
