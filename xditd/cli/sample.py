"""`xditctl sample`: a picture from files, without ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from xditd.cli import words
from xditd.cli.commands import MODEL, connect, endpoint_option, stderr, stdout
from xditd.cli.drawing import Wish, decode, draw, show
from xditd.cli.models import DTYPES, plan_options
from xditd.client import files
from xditd.protocol.messages import ModelRef, PlanRequest
from xditd.protocol.plans import LoraRef
from xditd.protocol.samplers import SAMPLERS

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class PictureSize(click.ParamType):
    """Width and height in pixels: "1024x768", or "1024" for a square."""

    name = "WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, _, height = value.lower().replace("×", "x").partition("x")
        if not (width.isdecimal() and (height or width).isdecimal()):
            self.fail(f"{value!r} is not a size: write 1024x768.", param, ctx)
        size = int(width), int(height or width)
        if min(size) < 16 or max(size) > 16384 or size[0] % 8 or size[1] % 8:
            self.fail(f"{value} must be multiples of 8 from 16 to 16384.", param, ctx)
        return size


class Sigmas(click.ParamType):
    """Descending numbers: "1,0.75,0.5,0"."""

    name = "S,S,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers: write 1,0.75,0.5,0.", param, ctx)


class Lora(click.ParamType):
    """A file below models/loras, and how much of it: "style/ink.safetensors:0.8"."""

    name = "NAME[:STRENGTH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LoraRef:
        if isinstance(value, LoraRef):
            return value
        name, colon, strength = value.rpartition(":")
        if not colon:
            return LoraRef(name=value)
        try:
            return LoraRef(name=name, strength=float(strength))
        except ValueError:
            self.fail(f"{strength!r} is not a strength: write ink.safetensors:0.8.", param, ctx)


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--conditioning",
    type=FILE,
    help="safetensors with the encoded prompt; for Flux: context [1, n, 4096], pooled [1, 768]; others: protocol.md, §8.",
)
@click.option("--prompt", help="For the demo's model and in its words: a red circle left of a blue square.")
@click.option(
    "--random-conditioning", is_flag=True, help="Noise instead of a prompt: to try the path or measure it."
)
@click.option(
    "--negative", type=FILE, help="safetensors with the encoded negative prompt, for --cfg above 1."
)
@click.option(
    "--latent",
    type=FILE,
    help="safetensors with a latent to begin from (ComfyUI's SaveLatent), with --denoise.",
)
@click.option("--vae", type=MODEL, help="VAE to decode with; without it only --save-latent makes sense.")
@click.option(
    "--tile",
    type=click.IntRange(0, 1 << 16),
    help="Side in pixels of tiles to decode in, which is approximate; 0: the picture whole. Default: in tiles where memory runs out.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("xditd.png"),
    show_default=True,
    help="PNG to write.",
)
@click.option(
    "--save-latent",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the latent, as ComfyUI's LoadLatent reads it.",
)
@click.option(
    "--size", type=PictureSize(), default="1024x1024", show_default=True, help="Of the picture, in pixels."
)
@click.option("--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Pictures at once.")
@click.option("--steps", type=click.IntRange(1, 4095), help="Default: the family's; 20 for FLUX.1-dev.")
@click.option(
    "--sigmas", type=Sigmas(), default=(), help="Explicit sigmas instead of --steps; the last may be 0."
)
@click.option("--mu", type=float, help="Shift of a flow's schedule. Default: 1.15 for FLUX.1-dev.")
@click.option(
    "--denoise",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1 begins late in the schedule.",
)
@click.option("--sampler", type=click.Choice(SAMPLERS), default="euler", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 3), default=0, show_default=True)
@click.option("--cfg", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--guidance", type=click.FloatRange(0), help="Distilled guidance. Default: 3.5 for FLUX.1-dev.")
@click.option(
    "--lora",
    type=Lora(),
    multiple=True,
    help="A LoRA below models/loras, and how much of it: ink.safetensors:0.8; several are added up.",
)
@click.option(
    "--warmup",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="With PipeFusion: first steps that are computed exactly.",
)
@click.option(
    "--patches",
    type=click.IntRange(0, 1024),
    default=0,
    help="With PipeFusion: patches of the picture; 0 is as many as devices.",
)
@plan_options
@click.option("--dtype", type=DTYPES, help="Compute dtype; default: the file's own.")
@endpoint_option
def sample(
    model: ModelRef,
    conditioning: Path | None,
    prompt: str | None,
    random_conditioning: bool,
    vae: ModelRef | None,
    tile: int | None,
    output: Path,
    save_latent: Path | None,
    asked: PlanRequest,
    dtype: str | None,
    endpoint: str | None,
    **wished: Any,
) -> None:
    """Draw with MODEL: conditioning in, PNG out.

    \b
    Examples:
      xditctl sample diffusion_models/flux1-dev.safetensors --conditioning prompt.safetensors \\
          --vae vae/ae.safetensors --size 1024x768 --seed 7 -o fox.png
      xditctl sample diffusion_models/flux1-dev.safetensors --random-conditioning --ulysses 2 --steps 4 \\
          --save-latent latent.safetensors
    """
    if (conditioning is not None) + (prompt is not None) + random_conditioning != 1:
        raise click.UsageError("Give one of --conditioning FILE, --prompt TEXT and --random-conditioning.")
    if vae is None and save_latent is None:
        raise click.UsageError("Give --vae for a picture, or --save-latent for the latent alone.")
    if vae is None and tile is not None:
        raise click.UsageError("--tile says how --vae decodes: give both.")
    wish = Wish(
        model=msgspec.structs.replace(model, dtype=dtype or ""),
        plan=asked,
        conditioning=conditioning,
        prompt=prompt,
        **wished,
    )
    console = stdout()
    with connect(endpoint) as client:
        drawn = draw(client, wish, stderr())
        show(drawn, console)
        for match in drawn.lora:
            console.print(f"   {words.lora(match)}", markup=False)
        if save_latent is not None:
            files.write_latent(save_latent, drawn.latent)
            console.print(f"   {save_latent}", markup=False, soft_wrap=True)
        if vae is not None:
            image = decode(client, vae, drawn.latent, stderr(), tile)
            notes = {
                "seed": str(wish.seed),
                "sampler": wish.sampler,
                "model": words.model(model),
                "Software": "xditd",
            }
            for path in files.write_png(output, image, notes):
                console.print(f"   {path}", markup=False, soft_wrap=True)
