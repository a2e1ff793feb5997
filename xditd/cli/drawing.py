"""From a model, conditioning and a seed to a picture, through a client. What `sample` and `demo` share.

Tensors come from and go to `xditd.client.files`; here is no torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from xditd.cli import words
from xditd.cli.bars import PhaseBar, StepBar
from xditd.cli.schedule import Habits, habits, known, sigmas
from xditd.client import Client, Run, files
from xditd.demo import conditioning
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, ModelRef, Plan, PlanRequest
from xditd.protocol.plans import LoraMatch, LoraRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be drawn. None is the model's habit.

    Attributes:
        conditioning: a safetensors file with the model's tensors (protocol.md, §8; Flux: context, pooled); without it and a
            prompt they are random.
        prompt: in the words of the demo's model, for that one; its negative is then the empty prompt.
        negative: as conditioning, for cfg above 1.
        latent: a file to begin from, unscaled as ComfyUI's LATENT; None begins from noise alone.
        size: width and height of the picture in pixels.
        sigmas: explicit ones; () makes `steps` of them.
        mu: shift of the sigmas.
        denoise: how much of the schedule is run, 0 to 1.
        warmup, patches: of a plan with pipefusion.
    """

    model: ModelRef
    plan: PlanRequest
    conditioning: Path | None = None
    prompt: str | None = None
    negative: Path | None = None
    latent: Path | None = None
    sampler: str = "euler"
    steps: int | None = None
    sigmas: tuple[float, ...] = ()
    mu: float | None = None
    denoise: float = 1.0
    seed: int = 0
    size: tuple[int, int] = (1024, 1024)
    batch: int = 1
    cfg: float = 1.0
    guidance: float | None = None
    lora: tuple[LoraRef, ...] = ()
    warmup: int = 1
    patches: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of it.

    Attributes:
        latent: [B, C, h, w], unscaled as ComfyUI's LATENT.
        group, plan: that ran it.
        steps: that were run.
        seconds: that the loop took.
        lora: what each LoRA changed of the model.
        degraded: why `plan` is less than was asked for; "" where it is not.
    """

    latent: torch.Tensor
    group: str
    plan: Plan
    steps: int
    seconds: float
    lora: tuple[LoraMatch, ...] = ()
    degraded: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that has its conditioning, and what its sampling takes beside it.

    Attributes:
        sigmas: of the schedule.
        noise: [B, C, h, w].
        start: a latent to begin from, unscaled; None is none.
        negative: whether there is a negative conditioning.
        habit: of the model.
    """

    sigmas: tuple[float, ...]
    noise: torch.Tensor
    start: torch.Tensor | None
    negative: bool
    habit: Habits


Tensors = dict[str, Any]
"""By name: torch tensors, or `Buffer`s."""


def prepare(
    run: Run,
    wish: Wish,
    positive: Tensors | None,
    negative: Tensors | None = None,
    start: torch.Tensor | None = None,
) -> Ready:
    """Puts the conditioning of a run; without a `positive` one, a random one of the wish's seed.

    Raises:
        XditError: whatever the daemon refuses, and `bad_value` for what a model does not take.
    """
    habit = habits(run.model)
    schedule = wish.sigmas or sigmas(
        known(run.model),
        wish.steps or habit.steps,
        habit.mu if wish.mu is None else wish.mu,
        wish.denoise,
        habit.table,
    )
    values = guidance_values(run.model, habit, wish.guidance)
    run.put_conditioning("positive", positive or random_conditioning(run.model, wish.seed), values)
    if negative is not None:
        run.put_conditioning("negative", negative, values)
    noise = files.noise(noise_shape(run.model, wish, start), wish.seed)
    return Ready(tuple(schedule), noise, start, negative is not None, habit)


def sampled(run: Run, ready: Ready, wish: Wish, console: Console, name: str) -> tuple[torch.Tensor, float]:
    """Samples it with a progress bar: the latent [B, C, h, w], unscaled as ComfyUI's LATENT, and the seconds of the loop."""
    habit, start = ready.habit, ready.start
    began = time.monotonic()
    with StepBar(console, name, len(ready.sigmas) - 1) as steps:
        latent = run.sample(
            ready.noise,
            ready.sigmas,
            "positive",
            sampler=wish.sampler,
            negative="negative" if ready.negative else None,
            cfg=wish.cfg,
            latent=None if start is None else (start - habit.shift) * habit.scale,
            callback=steps.step,
            previews=False,
            warmup=wish.warmup,
            patches=wish.patches,
        )
    seconds = time.monotonic() - began
    return latent / habit.scale + habit.shift, seconds


def draw(client: Client, wish: Wish, console: Console) -> Drawn:
    """Opens a run and samples it with a progress bar. Ctrl-C cancels the run.

    Raises:
        XditError: whatever the daemon refuses, and `bad_value` for what a model does not take.
    """
    positive, negative = given(client, wish)
    start = None if wish.latent is None else files.read_latent(wish.latent)
    name = words.model(wish.model)
    with PhaseBar(console, name) as bar:
        run = client.open_run(
            wish.model, wish.plan, label="xditctl sample", lora=wish.lora, on_event=bar.on_event
        )
    with run:
        try:
            ready = prepare(run, wish, positive, negative, start)
            latent, seconds = sampled(run, ready, wish, console, "sampling")
        except KeyboardInterrupt:
            cancel(run)
            raise
        group, plan = run.group, run.plan
    return Drawn(latent, group, plan, len(ready.sigmas) - 1, seconds, run.lora, run.degraded)


def show(drawn: Drawn, console: Console) -> None:
    """How long it took and under which plan, and why that is a lesser one than was asked for."""
    pace = f"{words.duration(drawn.seconds)}, {words.duration(drawn.seconds / drawn.steps)} a step"
    where = f"{words.degrees(drawn.plan)} on {', '.join(drawn.plan.devices)}"
    console.print(
        f"{words.OK} {words.plural(drawn.steps, 'step')} in {pace}: {where}", markup=False, soft_wrap=True
    )
    if drawn.degraded:
        console.print(words.degraded(drawn.degraded), style="yellow", markup=False)


def given(client: Client, wish: Wish) -> tuple[Tensors | None, Tensors | None]:
    """The positive and the negative conditioning of a wish; None where it says none."""
    if wish.prompt is not None:
        negative = conditioning.encode(client, "") if wish.cfg != 1 else None
        return conditioning.encode(client, wish.prompt), negative
    positive, negative = (
        None if path is None else files.read_tensors(path) for path in (wish.conditioning, wish.negative)
    )
    return positive, negative


def decode(
    client: Client, vae: ModelRef, latent: torch.Tensor, console: Console, tile: int | None = None
) -> torch.Tensor:
    """Latent [B, C, h, w], unscaled, to image [B, H, W, 3] in 0..1, with the VAE's loading shown, and what was degraded.

    Args:
        tile: as of `Run.decode`.
    """
    with PhaseBar(console, words.model(vae)) as bar:
        return client.decode(vae, latent, tile=tile, on_event=bar.on_event)


def cancel(run: Run) -> None:
    """Ends a run on the way out; one that is over by now is what was wanted."""
    try:
        run.cancel()
    except XditError as error:
        if error.code not in (Code.NO_SUCH_RUN, Code.RUN_CANCELLED, Code.RUN_LOST, Code.DAEMON_LOST):
            raise


def guidance_values(info: ModelInfo, habit: Habits, guidance: float | None) -> dict[str, float]:
    """The guidance that a distilled model takes as an input."""
    if habit.guidance is None:
        if guidance is not None:
            raise XditError(
                Code.BAD_VALUE, f"{info.name} is {info.family} {info.variant}, which takes no guidance."
            )
        return {}
    return {"guidance": habit.guidance if guidance is None else guidance}


def noise_shape(info: ModelInfo, wish: Wish, start: torch.Tensor | None) -> tuple[int, int, int, int]:
    """[B, C, h, w] of the noise: the starting latent's own shape where there is one."""
    if start is not None:
        batch, channels, height, width = start.shape
        return batch, channels, height, width
    width, height = wish.size
    scale = info.facts["scale"]
    return wish.batch, info.facts["latent_channels"], height // scale, width // scale


RANDOM: dict[str, dict[str, tuple[int | str, ...]]] = {
    "flux": {"context": (77, "context_width"), "pooled": ("pooled_width",)},
    "sd3": {"context": (77, "context_width"), "pooled": ("pooled_width",)},
    "sdxl": {"context": (77, "context_width"), "vector": ("vector_width",)},
    "pixart": {"context": (77, "context_width")},
    "hunyuandit": {"context": ("text_tokens", "context_width"), "context_t5": ("t5_tokens", "t5_width")},
}
"""By family: the tensors that condition it, and their shapes after the batch: numbers, or facts of the model."""


def random_conditioning(info: ModelInfo, seed: int) -> dict[str, torch.Tensor]:
    """Noise in the place of an encoded prompt: a picture of nothing, but by the whole path."""
    return {
        key: files.noise(
            (1, *(info.facts[size] if isinstance(size, str) else size for size in shape)), seed + i
        )
        for i, (key, shape) in enumerate(RANDOM[info.family].items(), 1)
    }
