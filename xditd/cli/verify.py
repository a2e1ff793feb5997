"""`xditctl verify`: the same sampling on one device and under each plan, and how far apart the results are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.text import Text

from xditd.cli import comparison, exits, words
from xditd.cli.bars import PhaseBar
from xditd.cli.commands import MODEL, connect, endpoint_option, json_option, print_json, stderr, stdout
from xditd.cli.comparison import Compared
from xditd.cli.drawing import Wish, decode, prepare, random_conditioning, sampled
from xditd.cli.models import DTYPES, names
from xditd.cli.sample import PictureSize
from xditd.cli.shapes import columns
from xditd.client import Client
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Loaded, ModelRef, PlanRequest

if TYPE_CHECKING:
    import torch

GUIDED = 2.0
"""The cfg scale of the sampling: not 1, so that cfg has something to split."""

STYLE = {
    "exact": "green",
    "approximate": "yellow",
    "refused": "dim",
    "too far": "bold red",
    "failed": "bold red",
}


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="PLAN",
    help="ulysses=2,ring=2, or a strategy's name; may be given several times. Default: every one over the devices.",
)
@click.option(
    "--devices",
    default="",
    metavar="0,1",
    help="Which, as `xditctl status` names them, or a span: 0-7; default: all.",
)
@click.option("--vae", type=MODEL, help="Decode with this VAE, and tell the PSNR of the pictures.")
@click.option("--size", type=PictureSize(), default="512x512", show_default=True, help="In pixels.")
@click.option("--steps", type=click.IntRange(1, 1000), default=4, show_default=True)
@click.option(
    "--warmup",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Of PipeFusion, which is exact where it is --steps.",
)
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True)
@click.option("--dtype", type=DTYPES, help="Compute dtype; default: the file's own.")
@json_option
@endpoint_option
def verify(
    endpoint: str | None,
    model: ModelRef,
    plans: tuple[str, ...],
    devices: str,
    vae: ModelRef | None,
    dtype: str | None,
    as_json: bool,
    **wished: Any,
) -> None:
    """Hold MODEL's plans against one device: largest and mean error, PSNR, time.

    The same noise and random conditioning, with classifier-free guidance. Exact plans must keep to a bound (float32: 1e-5
    of the latent's standard deviation, or twice what one device makes of noise that is shaken by 1e-6); of approximate ones
    the figure is told. What was not loaded is unloaded again.

    Status 1 where an exact plan is further off, or any plan failed. One that the model cannot have is told, and no failure.

    \b
    Examples:
      xditctl verify diffusion_models/flux1-dev.safetensors --vae vae/ae.safetensors
      xditctl verify diffusion_models/flux1-dev.safetensors --plan ulysses=2 --plan pipefusion=2 --warmup 2
      xditctl verify diffusion_models/flux1-dev.safetensors --plan ulysses=2,shard --plan offload=layerwise
    """
    model = msgspec.structs.replace(model, dtype=dtype or "")
    with connect(endpoint) as client:
        there = comparison.singly(names(devices)) or tuple(device.name for device in client.status().devices)
        asked = [comparison.parsed(text, there) for text in plans] or comparison.candidates(there)
        if not asked:
            raise XditError(Code.BAD_PLAN, f"{there[0]} is one device: there is no plan to hold against it.")
        trial = _Trial(client, Wish(model=model, plan=PlanRequest(), cfg=GUIDED, **wished), vae, stderr())
        results = trial.compare(comparison.one_device(there), asked)
    if as_json:
        print_json({"model": words.model(model), "plans": [comparison.plain(one) for one in results]})
    else:
        _show(results, stdout())
    if not all(one.good for one in results):
        click.get_current_context().exit(exits.FAILED)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A plan's two samplings: latents [B, C, h, w] of the first and the second, whose seconds they are."""

    loaded: Loaded
    before: torch.Tensor
    latent: torch.Tensor
    steps: int
    seconds: float


class _Trial:
    """Samplings that differ in their plans alone."""

    def __init__(self, client: Client, wish: Wish, vae: ModelRef | None, console: Console) -> None:
        self.client = client
        self.wish = wish
        self.vae = vae
        self.console = console

    def compare(self, reference: PlanRequest, plans: list[PlanRequest]) -> list[Compared]:
        """One device is sampled first: what goes wrong there is raised."""
        one_device = self._sample(reference, shaken=True)
        picture = self._decode(one_device.latent)
        shaken, _ = comparison.differences(one_device.before, one_device.latent)
        bound = comparison.bound(one_device.loaded.dtype, shaken)
        done = []
        for plan in plans:
            one = Compared(plan=comparison.spelled(plan))
            try:
                found = self._sample(plan)
                one = replace(
                    one, exact=comparison.is_exact(found.loaded.plan, self.wish.warmup, found.steps)
                )
                largest, mean = comparison.differences(found.latent, one_device.latent)
                image = self._decode(found.latent)
                done.append(
                    replace(
                        one,
                        plan=words.degrees(found.loaded.plan),
                        largest=largest,
                        mean=mean,
                        bound=bound if one.exact else None,
                        psnr=None if image is None else comparison.psnr(image, picture),
                        ratio=found.seconds / one_device.seconds,
                    )
                )
            except XditError as error:
                done.append(replace(one, problem=error.message, code=str(error.code)))
        return done

    def _sample(self, plan: PlanRequest, *, shaken: bool = False) -> _Sampled:
        """Loads, samples twice, since the first may compile, and gives the memory back.

        Args:
            shaken: the first time from shaken noise.
        """
        wish, name = self.wish, f"{words.model(self.wish.model)}, {comparison.spelled(plan)}"
        with PhaseBar(self.console, name) as bar:
            loaded = self.client.load(wish.model, plan, on_event=bar.on_event)
        try:
            with self.client.open_run(wish.model, plan, label="xditctl verify") as run:
                negative = random_conditioning(run.model, wish.seed + 1000)
                ready = prepare(run, wish, None, negative)
                first = replace(ready, noise=comparison.shake(ready.noise)) if shaken else ready
                before, _ = sampled(run, first, wish, self.console, name)
                latent, seconds = sampled(run, ready, wish, self.console, name)
                return _Sampled(loaded, before, latent, len(ready.sigmas) - 1, seconds)
        finally:
            if not loaded.warm:
                self._unload(loaded.group)

    def _unload(self, group: str) -> None:
        """Somebody else may use it by now: then it stays."""
        try:
            self.client.unload(group=group)
        except XditError as error:
            if error.code not in (Code.GROUP_BUSY, Code.NO_SUCH_GROUP):
                raise

    def _decode(self, latent: torch.Tensor) -> Any:
        return None if self.vae is None else decode(self.client, self.vae, latent, self.console).clone()


def _show(results: list[Compared], console: Console) -> None:
    numbers = ("largest", "mean", "bound", "PSNR", "time")
    table = columns("plan", "verdict", *numbers, "", right=numbers)
    for one in results:
        table.add_row(
            one.plan,
            Text(one.verdict, style=STYLE[one.verdict]),
            *(_figure(value) for value in (one.largest, one.mean, one.bound)),
            _decibels(one.psnr),
            words.UNKNOWN if one.ratio is None else f"{one.ratio:.2f}×",
            Text(one.problem, style="dim"),
        )
    console.print(table)
    worst = [one.plan for one in results if not one.good]
    if worst:
        console.print(f"{words.FAILED} Not as it must be: {words.joined(worst)}.", markup=False)
    elif any(one.verdict == "exact" for one in results):
        console.print(
            f"{words.OK} Every exact plan that it can have is the sampling of one device.", markup=False
        )
    else:
        console.print(f"{words.WARNING} No exact plan was held against one device.", markup=False)


def _figure(value: float | None) -> str:
    return words.UNKNOWN if value is None else f"{value:.1e}"


def _decibels(value: float | None) -> str:
    if value is None:
        return words.UNKNOWN
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
