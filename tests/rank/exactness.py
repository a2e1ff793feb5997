"""Every family under every plan, whatever the sizes, against plain diffusers in one process; and the table of it.

    python -m tests.rank.exactness [--write] [--only NAME]

Small models, float32, real ranks with real xfuser over gloo. Figures are the largest difference of a prediction over its
standard deviation; of a pipeline, which predicts nothing by itself, that of a sampled latent.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from bench.document import rewrite
from tests.rank.families import CASES, Case, Predict, normal
from tests.rank.pipelines import DIFFUSION, FLOW, Pipeline
from tests.rank.ranks import Ranks, framed, running
from tests.rank.reference import error, euler, slope
from xditd.catalog.detection import recognise
from xditd.catalog.families import TRANSFORMERS
from xditd.models.reading import WeightFile
from xditd.protocol import orders
from xditd.protocol.messages import DenoiseItem

DOCUMENT = Path(__file__).parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- families: made by tests.rank.exactness -->", "<!-- /families -->"
BOUND = 1e-5
TEXTS = (15, 77)

PLANS: dict[str, dict[str, Any]] = {
    "one device": {},
    "ulysses 2": {"ulysses": 2},
    "ring 2": {"ring": 2},
    "tensor 2": {"tensor": 2},
    "cfg 2": {"cfg": 2},
    "pipefusion 2, all warm-up": {"pipefusion": 2},
    "pipefusion 2, 1 of 6 warm-up": {"pipefusion": 2},
    "ulysses 2, sharded": {"ulysses": 2, "plan": {"shard": True}},
    "layerwise offload": {"plan": {"offload": "layerwise"}},
}

ALONE = ("one device", "layerwise offload")
"""Plans of one device. The first is for families that are not split: the others have it in all columns."""

WARMUPS = {"pipefusion 2, all warm-up": 6, "pipefusion 2, 1 of 6 warm-up": 1}
"""Of six steps of Euler's method."""

APPROXIMATE = ("pipefusion 2, 1 of 6 warm-up",)
"""Plans without a bound: the figure is to be known."""

Figures = dict[tuple[str, str, tuple[int, int]], float]
"""By case, plan and size: the worst of the texts."""


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/exactness.md.")
@click.option("--only", default="", help="Cases whose name begins so.")
def main(write: bool, only: str) -> None:
    """Compares, prints the table, and exits with 1 where something is further apart than it may be."""
    if write and only:
        raise click.UsageError("The document has the table of all cases: write it without --only.")
    torch.set_num_threads(1)
    begin, figures = time.monotonic(), {}
    for name, case in CASES.items():
        if name.startswith(only):
            for plan in PLANS:
                if plan in ALONE[1:] or (plan in ALONE) != case.parallel:
                    with tempfile.TemporaryDirectory() as folder:
                        figures |= compare(Path(folder), name, case, plan)
    text = table(figures)
    click.echo(text)
    click.echo(f"{time.monotonic() - begin:.0f} s", err=True)
    if write:
        rewrite(DOCUMENT, BEGIN, text, END)
    if any(figure > BOUND for (_, plan, _), figure in figures.items() if plan not in APPROXIMATE):
        sys.exit(1)


def compare(folder: Path, name: str, case: Case, plan: str) -> Figures:
    """One case under one plan, at all of its sizes."""
    path = case.make(folder / "model.safetensors")
    facts = recognise(WeightFile(path).header, "transformer").facts
    table = TRANSFORMERS[case.family].noise(facts).sigmas()
    with running(folder, path=path, family=case.family, **PLANS[plan], wait=False) as ranks:
        reference = case.reference(path)
        ranks.ready()
        figures: Figures = {}
        for size in case.sizes:
            worst = 0.0
            for text in TEXTS:
                if plan in WARMUPS:
                    worst = max(worst, _sampled(ranks, reference, case, table, size, text, WARMUPS[plan]))
                else:
                    worst = max(worst, _predicted(ranks, reference, case, size, text))
                ranks.send(orders.ForgetRun(run=1))
            figures[name, plan, size] = worst
            click.echo(f"{worst:.1e} {name}, {plan}, {size[0]}×{size[1]}", err=True)
    return figures


def _predicted(ranks: Ranks, reference: Predict, case: Case, size: tuple[int, int], text: int) -> float:
    """The worse of two texts of two lengths in one turn, as cond and uncond are."""
    givens = [case.conditioning(length) for length in (text, text + 4)]
    x, t = normal(1, case.channels, *size), torch.tensor([case.t])
    for i, given in enumerate(givens):
        ranks.condition(1, str(i), given)
    predictions = _ask(ranks, x, case.t)
    return max(
        error(prediction, reference(x, t, given))
        for prediction, given in zip(predictions, givens, strict=True)
    )


def _sampled(
    ranks: Ranks,
    reference: Predict,
    case: Case,
    table: list[float],
    size: tuple[int, int],
    text: int,
    warmup: int,
) -> float:
    """Of a latent that a pipeline samples, from noise to its last step.

    Args:
        table: the sigma of every timestep that the model was trained at.
    """
    given, noise = case.conditioning(text), normal(1, case.channels, *size)
    sigmas = FLOW if case.predicts == "flow" else DIFFUSION
    ranks.condition(1, "c", given)
    latent = Pipeline(ranks).sample(1, noise, sigmas, warmup=warmup)
    velocity = partial(slope, case.predicts, table, partial(reference, given=given))
    return error(latent, euler(velocity, list(sigmas), noise))


def _ask(ranks: Ranks, x: torch.Tensor, t: float) -> list[torch.Tensor]:
    described, frames = framed([x, x])
    items = tuple(DenoiseItem(x=each, t=(t,), conditioning=str(i)) for i, each in enumerate(described))
    _, predictions = ranks.turn(orders.TurnDenoise(order=1, run=1, items=items), *frames)
    return predictions


def table(figures: Figures) -> str:
    """The figures as Markdown, a row for each case and size."""
    plans = [plan for plan in PLANS if any(key[1] == plan for key in figures)]
    rows = []
    for name, size in dict.fromkeys((key[0], key[2]) for key in figures):
        cells = [figures.get((name, plan, size)) for plan in plans]
        shown = ["" if figure is None else f"{figure:.1e}" for figure in cells]
        rows.append(f"| {name.replace('_', ' ')} | {size[0]}×{size[1]} | {' | '.join(shown)} |")
    return "\n".join([f"| model | latent | {' | '.join(plans)} |", "|---|---|" + "---|" * len(plans), *rows])


if __name__ == "__main__":
    main()
