"""`xditctl models`, `load`, `unload` and `free`: files that can be loaded, and groups that hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xditd.cli import words
from xditd.cli.bars import PhaseBar
from xditd.cli.commands import MODEL, connect, endpoint_option, json_option, print_json, stderr, stdout
from xditd.protocol.figures import MemoryStatus
from xditd.protocol.messages import ModelList, ModelRef, PlanRequest
from xditd.protocol.plans import OFFLOADS, WEIGHT_DTYPES

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = click.Choice(["bfloat16", "float16", "float32"])


STRATEGIES = ("auto", "Hybrid", "USP", "CFG", "PipeFusion", "Tensor")
"""As the daemon knows them; what it has not built it refuses by name."""


DEGREE_HELP = {
    "ulysses": "Ulysses degree; 0 is the planner's choice.",
    "ring": "Ring degree; 0 is the planner's choice.",
    "pipefusion": "PipeFusion degree: how many stages the blocks are dealt out to; approximate.",
    "tensor": "Tensor degree: how many devices share the weights of each layer.",
    "patch": "Patch degree, of a VAE: how many devices share each picture.",
}


def plan_options(command: F) -> F:
    """--strategy, the degrees, --devices, --offload, --shard, --weight-dtype, --fallback: the command gets a PlanRequest of them as `asked`.

    What is left out is the planner's choice.
    """

    @functools.wraps(command)
    def with_plan(
        *arguments: Any,
        devices: str,
        cfg_degree: int,
        fallback: str | None,
        offload: str | None,
        shard: bool,
        weight_dtype: str | None,
        **others: Any,
    ) -> Any:
        chosen = {name: others.pop(name) for name in ("strategy", *DEGREE_HELP)}
        plan = PlanRequest(
            cfg=cfg_degree,
            devices=names(devices),
            fallback=fallback or "",
            offload=offload or "",
            shard=shard,
            weight_dtype=weight_dtype or "",
            **chosen,
        )
        return command(*arguments, asked=plan, **others)

    decorated: Any = with_plan
    for decorate in (
        click.option(
            "--fallback",
            type=click.Choice(("auto", "never")),
            help="Of a plan that cannot be had: auto does it with fewer devices, item by item or with offload, never does not; default: as the daemon is configured.",
        ),
        click.option(
            "--weight-dtype",
            type=click.Choice([dtype for dtype in WEIGHT_DTYPES if dtype]),
            help="Weights are kept in 8 bits and cast layer by layer: the fp8 of a file as it is (file), or rounded to fp8.",
        ),
        click.option(
            "--shard",
            is_flag=True,
            help="With ulysses and ring: each device holds a share of the weights, and gathers a layer before it runs.",
        ),
        click.option(
            "--offload",
            type=click.Choice([offload for offload in OFFLOADS if offload]),
            help="Weights wait in the host's memory, and come to the device for a turn (model) or layer by layer (layerwise).",
        ),
        click.option(
            "--devices",
            default="",
            metavar="0,1",
            help="Which devices, as `xditctl status` names them, or a span: 0-7; default: all.",
        ),
        *(
            click.option(f"--{name}", type=click.IntRange(0, 1024), default=0, help=text)
            for name, text in reversed(DEGREE_HELP.items())
        ),
        click.option(
            "--cfg-degree",
            type=click.IntRange(0, 1024),
            default=0,
            help="CFG degree: 2 computes positive and negative side by side.",
        ),
        click.option(
            "--strategy",
            type=click.Choice(STRATEGIES, case_sensitive=False),
            default=STRATEGIES[0],
            show_default=True,
            help="How the devices share the work. CFG computes positive and negative side by side; with Tensor and PipeFusion "
            "each device holds a share of the weights. PipeFusion is approximate.",
        ),
    ):
        decorated = decorate(decorated)
    with_options: F = decorated
    return with_options


def names(devices: str) -> tuple[str, ...]:
    """Of devices, as they are written on a command line."""
    return tuple(name for name in (part.strip() for part in devices.split(",")) if name)


@click.command()
@click.option(
    "--kind", default="", help="Only this kind: diffusion_models, checkpoints, vae, text_encoders, loras."
)
@json_option
@endpoint_option
def models(endpoint: str | None, kind: str, as_json: bool) -> None:
    """List the models that the daemon can load.

    And the files that it cannot, each with the reason.

    \b
    Examples:
      xditctl models
      xditctl models --kind vae
      xditctl models --json | jq -r '.models[] | .kind + "/" + .name'
    """
    with connect(endpoint, shared_memory=False) as client:
        answer = client.models(kind)
    if as_json:
        print_json(answer)
    else:
        show_models(stdout(), answer)


def show_models(console: Console, answer: ModelList) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 1, 0, 0)
    )
    for column in ("model", "family", "dtype", "parameters", "size"):
        table.add_column(
            column, overflow="fold", justify="right" if column in ("parameters", "size") else "left"
        )
    for info in answer.models:
        family = f"{info.family} {info.variant}".strip()
        name = words.model(ModelRef(kind=info.kind, name=info.name, part=info.part))
        table.add_row(Text(name), family, info.dtype, words.count(info.parameters), words.size(info.bytes))
    if answer.models:
        console.print(table)
    else:
        console.print(f"{words.WARNING} No model that the daemon can load.")
    for skipped in answer.skipped:
        name = f"{skipped.kind}/{skipped.name}"
        text = skipped.message if name in skipped.message else f"{name}: {skipped.message}"
        console.print(f"{words.WARNING} {text}", style="yellow", markup=False)
    if answer.more:
        console.print(f"{words.WARNING} {answer.more} more; name a kind to see fewer at once.")
    if not answer.models:
        where = (
            words.joined(answer.roots)
            if answer.roots
            else "nowhere: set [models] comfyui or folders in its configuration"
        )
        console.print(f"   It looks in {where}.", markup=False)


@click.command()
@click.argument("model", type=MODEL)
@plan_options
@click.option(
    "--replicas",
    type=click.IntRange(1, 1024),
    default=1,
    help="Groups that share the devices evenly, for several runs at once; default: 1.",
)
@click.option("--dtype", type=DTYPES, help="Compute dtype; default: the file's own.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), help="Seconds to wait; default: as long as the daemon does."
)
@json_option
@endpoint_option
def load(
    endpoint: str | None,
    model: ModelRef,
    asked: PlanRequest,
    replicas: int,
    dtype: str | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Have MODEL ready under a plan; return when it is.

    \b
    Examples:
      xditctl load diffusion_models/flux1-dev.safetensors
      xditctl load diffusion_models/flux1-dev.safetensors --ulysses 2 --ring 2 --devices 0,1,2,3
      xditctl load diffusion_models/flux1-dev.safetensors --devices 0-7 --replicas 4
      xditctl load diffusion_models/sd3.5_large.safetensors --strategy CFG --devices 0-3
    """
    model = msgspec.structs.replace(model, dtype=dtype or "")
    plan = msgspec.structs.replace(asked, replicas=replicas if replicas > 1 else 0)
    with connect(endpoint, shared_memory=False) as client, PhaseBar(stderr(), words.model(model)) as bar:
        answer = client.load(model, plan, on_event=bar.on_event, timeout=timeout)
    if as_json:
        print_json(answer)
        return
    how = "was ready already" if answer.warm else f"is ready after {words.duration(answer.seconds)}"
    where = f"{words.degrees(answer.plan)} on {', '.join(answer.plan.devices)}"
    console = stdout()
    console.print(f"{words.OK} {words.model(model)} {how}: group {answer.group}, {where}", markup=False)
    if len(answer.groups) > 1:
        console.print(f"   {len(answer.groups)} replicas: groups {words.joined(answer.groups)}", markup=False)
    if answer.degraded:
        console.print(words.degraded(answer.degraded), style="yellow", markup=False)
    for warning in answer.warnings:
        console.print(f"{words.WARNING} {warning}", style="yellow", markup=False)
    if answer.plan.reason:
        console.print(f"   {answer.plan.reason}", style="dim", markup=False)


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--group", default="", help="This group alone, as `xditctl status` names it.")
@click.option("--force", is_flag=True, help="Also with runs on it; they fail.")
@json_option
@endpoint_option
def unload(endpoint: str | None, model: ModelRef | None, group: str, force: bool, as_json: bool) -> None:
    """End the groups of MODEL, and free their memory.

    \b
    Examples:
      xditctl unload diffusion_models/flux1-dev.safetensors
      xditctl unload --group g3 --force
    """
    if (model is None) == (not group):
        raise click.UsageError("Name either a MODEL or a --group.")
    with connect(endpoint, shared_memory=False) as client:
        answer = client.unload(model, group=group, force=force)
    if as_json:
        print_json(answer)
    else:
        stdout().print(
            f"{words.OK} Ended {words.joined(answer.groups) or 'nothing: no group held it'}.", markup=False
        )


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--group", default="", help="This group alone, as `xditctl status` names it.")
@json_option
@endpoint_option
def sleep(endpoint: str | None, model: ModelRef | None, group: str, as_json: bool) -> None:
    """Have MODEL sleep in the host's memory: its devices' memory is free until the next run, or `xditctl load`, wakes it.

    \b
    Examples:
      xditctl sleep diffusion_models/flux1-dev.safetensors
      xditctl sleep --group g3
    """
    if (model is None) == (not group):
        raise click.UsageError("Name either a MODEL or a --group.")
    with connect(endpoint, shared_memory=False) as client:
        answer = client.sleep(model, group=group)
    if as_json:
        print_json(answer)
        return
    console = stdout()
    console.print(f"{words.OK} {words.joined(answer.groups)} sleeps.", markup=False)
    _show_memory(console, answer.before, answer.after)


def _show_memory(console: Console, before: tuple[MemoryStatus, ...], after: tuple[MemoryStatus, ...]) -> None:
    for was, now in zip(before, after, strict=True):
        console.print(
            f"   {was.device}: {words.size(was.used)} in use before, {words.size(now.used)} after",
            markup=False,
        )


@click.command()
@click.option(
    "--gib", type=click.FloatRange(min=0), default=0, help="GiB that each device gets back; default: all."
)
@click.option("--devices", default="", metavar="0,1", help="Which devices, or a span: 0-7; default: all.")
@json_option
@endpoint_option
def free(endpoint: str | None, gib: float, devices: str, as_json: bool) -> None:
    """Give memory back: end models that no run uses, those that are worth least first.

    \b
    Examples:
      xditctl free
      xditctl free --gib 10 --devices 0
    """
    with connect(endpoint, shared_memory=False) as client:
        answer = client.free_memory(int(gib * 2**30), names(devices))
    if as_json:
        print_json(answer)
        return
    console = stdout()
    console.print(
        f"{words.OK} Ended {words.joined(answer.groups) or 'nothing: no idle model is there'}.", markup=False
    )
    _show_memory(console, answer.before, answer.after)
    if answer.in_use:
        console.print(f"   Runs use {words.joined(answer.in_use)}.", style="dim", markup=False)
