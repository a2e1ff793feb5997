"""The demo's model before the judge: held-out captions drawn by a daemon under a plan, and how many pictures fit.

    python -m tests.quality.exam --write     # docs/quality.md; ten minutes on two cores

Every plan draws the same captions from the same noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from bench.document import rewrite
from tests.live.service import serving
from tools.train_demo import dataset
from tools.train_demo.judge import judge
from tools.train_demo.scenes import SIDE, Description, caption
from xditd.cli import comparison
from xditd.cli.drawing import Wish, decode, given, prepare, sampled
from xditd.client import Client
from xditd.demo import conditioning, prompt
from xditd.protocol.plans import PlanRequest

DOCUMENT = Path(__file__).parents[2] / "docs" / "quality.md"
MARKS = ("<!-- scores: made by tests.quality.exam -->", "<!-- end of scores -->")
QUIET = Console(quiet=True)

STEPS, CFG = 16, 1.0
"""As `xditctl demo` draws."""

SHAKEN = "one rank, noise shaken by 1e-6"
"""What rounding becomes where nothing else is different."""

ONE = PlanRequest(devices=("cpu:0",))

PLANS: dict[str, tuple[PlanRequest, int]] = {
    "one rank": (ONE, 1),
    SHAKEN: (ONE, 1),
    "ulysses 2": (PlanRequest(ulysses=2), 1),
    "ring 2": (PlanRequest(ring=2), 1),
    "tensor 2": (PlanRequest(tensor=2), 1),
    **{f"PipeFusion 2, warm-up {warmup}": (PlanRequest(pipefusion=2), warmup) for warmup in (1, 2, 4, 8)},
}
"""By name: a plan, and its warm-up steps."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of `count` pictures, how many fit, and what was wrong with others by their captions; with the latents [count, 16, 32, 32]."""

    count: int
    faults: dict[str, tuple[str, ...]]
    latents: torch.Tensor

    @property
    def fit(self) -> int:
        return self.count - len(self.faults)

    def __str__(self) -> str:
        return f"{self.fit} of {self.count} ({self.fit / self.count:.0%})"


@contextmanager
def examined(folder: Path, **settings: Any) -> Iterator[Client]:
    """A client of a daemon that has the demo's models and two ranks."""
    given = {"devices.cpu_ranks": 2, "devices.threads": 1, "models.comfyui": str(prompt.folder().parent)}
    with serving(folder, **given, **settings) as service, service.client() as client:
        yield client


def sit(
    client: Client,
    exam: list[Description],
    plan: PlanRequest,
    *,
    steps: int = STEPS,
    cfg: float = CFG,
    warmup: int = 1,
    shaken: bool = False,
) -> Score:
    """Draws what the descriptions say, 256², as `xditctl demo` does, and has the pictures judged.

    Args:
        shaken: from noise that is changed as `xditctl verify` does.
    """
    faults: dict[str, tuple[str, ...]] = {}
    latents = []
    for seed, description in enumerate(exam):
        wish = Wish(
            model=conditioning.FLUX,
            plan=plan,
            prompt=caption(description),
            seed=seed,
            size=(SIDE, SIDE),
            steps=steps,
            cfg=cfg,
            warmup=warmup,
        )
        with client.open_run(wish.model, plan) as run:
            ready = prepare(run, wish, *given(client, wish))
            if shaken:
                ready = replace(ready, noise=comparison.shake(ready.noise))
            latent, _ = sampled(run, ready, wish, QUIET, "")
        latents.append(latent)
        (picture,) = decode(client, conditioning.VAE, latent, QUIET)
        verdict = judge(picture.numpy(), description)
        if not verdict.fits:
            faults[caption(description)] = verdict.faults
    return Score(len(exam), faults, torch.cat(latents))


def table(client: Client, count: int, steps: int, cfg: float) -> Iterator[str]:
    """The rows of docs/quality.md, as they come."""
    exam = dataset.exam(count)
    first: Score | None = None
    for name, (plan, warmup) in PLANS.items():
        score = sit(client, exam, plan, steps=steps, cfg=cfg, warmup=warmup, shaken=name == SHAKEN)
        first = first or score
        apart = (score.latents - first.latents).abs().max() / first.latents.std()
        yield f"| {name} | {score} | {apart:.1e} |"


@click.command()
@click.option("--count", default=48, help="Captions.")
@click.option("--steps", default=STEPS)
@click.option("--cfg", default=CFG)
@click.option("--write", is_flag=True, help="Into docs/quality.md.")
def main(count: int, steps: int, cfg: float, write: bool) -> None:
    """Prints the table of scores by plan."""
    head = [
        f"Of {count} held-out captions, {steps} steps of Euler, cfg {cfg:g}, 256², float32, {time.strftime('%Y-%m-%d')}:",
        "",
        "| plan | pictures that fit | greatest difference of a latent from one rank's, over its standard deviation |",
        "|---|---|---|",
    ]
    print(*head, sep="\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder, examined(Path(folder)) as client:
        for row in table(client, count, steps, cfg):
            print(row, flush=True)
            rows.append(row)
    if write:
        rewrite(DOCUMENT, MARKS[0], "\n".join([*head, *rows]), MARKS[1])


if __name__ == "__main__":
    main()
