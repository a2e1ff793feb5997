"""The demo's model before the judge: held-out captions drawn by a daemon under a plan, and how many pictures fit.

    python -m tests.quality.exam --write     # docs/quality.md; an hour on two cores

Every plan draws the same captions from the same noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from tests.live.service import serving
from tools.train_demo import dataset
from tools.train_demo.judge import judge
from tools.train_demo.scenes import Description, caption
from xditd.cli.schedule import habits, known, sigmas
from xditd.client import Client, files
from xditd.demo import conditioning, prompt
from xditd.protocol.plans import PlanRequest

DOCUMENT = Path(__file__).parents[2] / "docs" / "quality.md"
MARKS = ("<!-- scores: made by tests.quality.exam -->", "<!-- end of scores -->")
TOGETHER = 4
"""Pictures of a run."""

PLANS: dict[str, tuple[PlanRequest, int]] = {
    "one rank": (PlanRequest(devices=("cpu:0",)), 1),
    "ulysses 2": (PlanRequest(ulysses=2), 1),
    "ring 2": (PlanRequest(ring=2), 1),
    "tensor 2": (PlanRequest(tensor=2), 1),
    "PipeFusion 2, warm-up 1": (PlanRequest(pipefusion=2), 1),
    "PipeFusion 2, warm-up 2": (PlanRequest(pipefusion=2), 2),
    "PipeFusion 2, warm-up 4": (PlanRequest(pipefusion=2), 4),
    "PipeFusion 2, warm-up 8": (PlanRequest(pipefusion=2), 8),
}
"""By name: a plan, and its warm-up steps."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of `count` pictures, how many fit; what was wrong with others; and the seconds that sampling took."""

    fit: int
    count: int
    faults: dict[str, tuple[str, ...]]
    seconds: float
    latents: torch.Tensor

    @property
    def share(self) -> float:
        return self.fit / self.count

    def __str__(self) -> str:
        return f"{self.fit} of {self.count} ({self.share:.0%})"


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
    steps: int,
    cfg: float,
    guidance: float = 3.5,
    warmup: int = 1,
) -> Score:
    """Draws what the descriptions say, 256², and has the pictures judged."""
    faults: dict[str, tuple[str, ...]] = {}
    latents, seconds = [], 0.0
    for begin in range(0, len(exam), TOGETHER):
        part = exam[begin : begin + TOGETHER]
        texts = [caption(description) for description in part]
        noise = files.noise((len(part), 16, 32, 32), begin)
        with client.open_run(conditioning.FLUX, plan) as run:
            habit = habits(run.model)
            values = {"guidance": guidance}
            run.put_conditioning("positive", conditioning.encode(client, *texts), values)
            if cfg != 1:
                run.put_conditioning("negative", conditioning.encode(client, *[""] * len(part)), values)
            began = time.monotonic()
            latent = run.sample(
                noise,
                sigmas(known(run.model), steps, habit.mu),
                "positive",
                negative="negative" if cfg != 1 else None,
                cfg=cfg,
                warmup=warmup,
                previews=False,
            )
            seconds += time.monotonic() - began
            latents.append(latent.clone())
        pictures = client.decode(conditioning.VAE, latent / habit.scale + habit.shift)
        for text, picture, description in zip(texts, np.asarray(pictures), part, strict=True):
            verdict = judge(picture, description)
            if not verdict.fits:
                faults[text] = verdict.faults
    return Score(len(exam) - len(faults), len(exam), faults, seconds, torch.cat(latents))


def table(client: Client, count: int, steps: int, cfg: float) -> Iterator[str]:
    """The rows of docs/quality.md, as they come."""
    exam = dataset.exam(count)
    first: Score | None = None
    for name, (plan, warmup) in PLANS.items():
        score = sit(client, exam, plan, steps=steps, cfg=cfg, warmup=warmup)
        first = first or score
        apart = (score.latents - first.latents).abs().max() / first.latents.std()
        yield f"| {name} | {score} | {apart:.1e} |"


@click.command()
@click.option("--count", default=48, help="Captions.")
@click.option("--steps", default=16)
@click.option("--cfg", default=3.5)
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
        text = DOCUMENT.read_text()
        before, rest = text.split(MARKS[0])
        _, after = rest.split(MARKS[1])
        DOCUMENT.write_text("\n".join([before + MARKS[0], *head, *rows, MARKS[1] + after]))


if __name__ == "__main__":
    main()
