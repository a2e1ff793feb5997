"""Compares KSamplers within ComfyUI with ones through a daemon, and writes docs/exactness.md.

    python -m tests.comfy.exactness CHECKOUT=PYTHON [CHECKOUT=PYTHON …] [--samplers N] [--write]

A checkout of ComfyUI and the python of its environment; several make a column each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from tests.live.service import Service, serving
from xditd.models.making import make_flux

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "exactness.md"
FLUX = {"heads": 2, "head_dim": 128, "context_width": 256, "pooled_width": 64}
BOUND = 1e-5

NEXT = "## Every family against one process"
"""Where what this writes of the document ends."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Comfy:
    checkout: Path
    python: str

    @property
    def version(self) -> str:
        return (self.checkout / "comfyui_version.py").read_text().split('"')[1]

    def environment(self) -> dict[str, str]:
        return {"COMFYUI_PATH": str(self.checkout), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def compare(self, model: Path, service: Service, *options: str) -> list[Line]:
        command = [self.python, "-m", "tests.comfy.inside.exactness", str(model), service.endpoint, *options]
        environment = {**os.environ, **self.environment()}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            lines = []
            for text in process.stdout:
                if text.startswith("{"):
                    lines.append(json.loads(text))
                    click.echo(
                        f"{lines[-1]['abs']:.1e} {lines[-1]['relative']:.1e} {lines[-1]['case']}", err=True
                    )
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}.")
        return lines


@click.command()
@click.argument("comfyuis", nargs=-1, required=True)
@click.option("--samplers", default=1000, help="Only the first so many samplers.")
@click.option("--write", is_flag=True, help="Write docs/exactness.md.")
def main(comfyuis: Sequence[str], samplers: int, write: bool) -> None:
    """Compares, prints the document and exits with 1 where something is further apart than it may be."""
    comfies = [Comfy(Path(text.partition("=")[0]).resolve(), text.partition("=")[2]) for text in comfyuis]
    with tempfile.TemporaryDirectory() as folder:
        model = make_flux(Path(folder) / "diffusion_models" / "flux.safetensors", **FLUX, dtype=torch.float32)
        limit = f"--samplers={samplers}"
        own, xfuser = {}, {}
        for comfy in comfies:
            ranks = [comfy.python, "-m", "tests.comfy.inside.rank"]
            with seeing(
                Path(folder), comfy.environment(), **{"debug.rank_command": ranks, "devices.cpu_ranks": 1}
            ) as service:
                own[comfy.version] = comfy.compare(model, service, limit)
            with seeing(Path(folder), {}, **{"devices.cpu_ranks": 2}) as service:
                xfuser[comfy.version] = comfy.compare(model, service, limit, "--amplify")
    text = document(own, xfuser)
    click.echo(text)
    if write:
        # What follows is of other makers.
        _, mark, rest = DOCUMENT.read_text(encoding="utf-8").partition(NEXT)
        DOCUMENT.write_text(f"{text}\n{mark}{rest}" if mark else text, encoding="utf-8")
    if over(xfuser) or any(line["abs"] for lines in own.values() for line in lines):
        sys.exit(1)


@contextmanager
def seeing(models: Path, environment: dict[str, str], **settings: Any) -> Iterator[Service]:
    """A daemon that sees these models, with a folder of its own."""
    base = {
        "devices.threads": 1,
        "models.folders": {"diffusion_models": [str(models / "diffusion_models")]},
    }
    with (
        tempfile.TemporaryDirectory() as home,
        serving(Path(home), environment, **base, **settings) as service,
    ):
        yield service


def over(xfuser: dict[str, list[Line]]) -> list[Line]:
    """Cases beyond the bound, and beyond twice what their sampler made of a relative 1e-6 a step on one device."""
    worst: dict[str, float] = {}
    for lines in xfuser.values():
        for line in lines:
            worst[line["sampler"]] = max(worst.get(line["sampler"], 0.0), line["amplified"])
    return [
        line
        for lines in xfuser.values()
        for line in lines
        if line["relative"] > max(BOUND, 2 * worst[line["sampler"]])
    ]


def document(own: dict[str, list[Line]], xfuser: dict[str, list[Line]]) -> str:
    versions = list(own)
    samplers = list(dict.fromkeys(line["sampler"] for lines in xfuser.values() for line in lines))
    rows = []
    for sampler in samplers:
        cells = []
        for version in versions:
            mine = [line for line in xfuser[version] if line["sampler"] == sampler]
            cells += (
                [
                    f"{max(line['relative'] for line in mine):.1e}",
                    f"{max(line['amplified'] for line in mine):.1e}",
                ]
                if mine
                else ["–", "–"]
            )
        rows.append(f"| `{sampler}` | {' | '.join(cells)} |")
    head = " | ".join(f"ComfyUI {version}: two ranks | one device, shaken" for version in versions)
    bits = "\n".join(
        f"| {version} | {len(lines)} | {len({line['sampler'] for line in lines})} | {max(line['abs'] for line in lines):g} |"
        for version, lines in own.items()
    )
    beyond_it = [
        f"- {line['case']} (ComfyUI {version}): {line['relative']:.1e} on two ranks, {line['amplified']:.1e} shaken"
        for version, lines in xfuser.items()
        for line in lines
        if line["relative"] > BOUND
    ]
    beyond = (
        "Cases over 1e-5, each of a sampler that amplifies rounding on one device as well (dpm_adaptive chooses its steps by\n"
        "their error, and may choose others); a case more than twice as far as its sampler's worst there is a failure:\n\n"
        + "\n".join(beyond_it)
        if beyond_it
        else "No case is over 1e-5."
    )
    return f"""# How exact it is

Every figure of the first two tables is made by one command, in ComfyUI's own environments and against real daemons; it
makes the third as well:

    make exactness COMFYUI="CHECKOUT=PYTHON CHECKOUT=PYTHON"

Each case of the first two tables samples a small Flux (fp32, random weights, 6 steps) twice: with a local model in ComfyUI, and with a MODEL of
xditd in the same ComfyUI. The cases are such that every two of these choices meet at least once: sampler, scheduler
(simple, normal, karras, beta), cfg (1, 4), batch (1, 3), way (KSampler, denoise 0.5, a noise mask over a part, KSampler
Advanced in two halves), texts (of one length, of two lengths, for an area, for a range of timesteps), size (128×128,
112×144).

## ComfyUI's own module in the rank: not one bit differs

The ranks run ComfyUI's transformer on what came over the wire, and on nothing else. What differs then would be ours:
the conversation, the conditioning, the joint call of cond and uncond.

| ComfyUI | cases | samplers | greatest difference |
|---|---|---|---|
{bits}

## xfuser on two ranks (ulysses 2)

The greatest difference of a latent's value, over the latent's standard deviation, worst case of each sampler. Beside it
what the same sampler makes, on one device, of a transformer whose output is wrong by a relative 1e-6 at every step: a
sampler that amplifies rounding does so everywhere.

| sampler | {head} |
|---|{"---|---|" * len(versions)}
{chr(10).join(rows)}

{beyond}
"""


if __name__ == "__main__":
    main()
