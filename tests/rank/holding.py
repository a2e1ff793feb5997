"""What a rank holds of a transformer under plans by which it holds less, told by real ranks; and the table of it.

    python -m tests.rank.holding [--write] [--only NAME]

Models as deep as those that people have, and narrower by one factor throughout, so that what is in no block counts as it does
there. Figures are bytes of parameters and buffers on a rank's device, the most of all ranks, over those of one process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from bench.document import rewrite
from tests.rank.ranks import running
from xditd.models.families import load
from xditd.models.making import make_flux
from xditd.models.making_transformers import (
    hunyuandit_facts,
    make_hunyuandit,
    make_pixart,
    make_sd3,
    pixart_facts,
    sd3_facts,
)
from xditd.models.reading import held
from xditd.protocol.plans import FP8

DOCUMENT = Path(__file__).parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- held: made by tests.rank.holding -->", "<!-- /held -->"
BOUND = 0.55
"""Of what two ranks share, the most that one may hold."""

PLANS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2},
    "tensor 4": {"tensor": 4},
    "ulysses 2, sharded": {"ulysses": 2, "plan": {"shard": True}},
    "ring 4, sharded": {"ring": 4, "plan": {"shard": True}},
    "pipefusion 2": {"pipefusion": 2},
    "layerwise offload": {"plan": {"offload": "layerwise"}},
    "tensor 2, layerwise offload": {"tensor": 2, "plan": {"offload": "layerwise"}},
    FP8[0]: {"plan": {"weight_dtype": FP8[0]}},
    f"tensor 2, {FP8[0]}": {"tensor": 2, "plan": {"weight_dtype": FP8[0]}},
}
BY_HALF = ("tensor 2", "ulysses 2, sharded")
"""Plans that are held to the bound."""


@dataclass(frozen=True)
class Model:
    """One that is measured: its family, and what writes its file."""

    family: str
    make: Callable[[Path], Path]


def _flux(path: Path) -> Path:
    facts = {"heads": 8, "head_dim": 32, "context_width": 344, "pooled_width": 64}
    return make_flux(path, **facts, double_blocks=19, single_blocks=38, dtype=torch.bfloat16)


def _sd3(path: Path) -> Path:
    facts = sd3_facts(width=256, blocks=38, qk_norm=True, context_width=432, pooled_width=216)
    return make_sd3(path, facts, dtype=torch.bfloat16)


def _pixart(path: Path) -> Path:
    return make_pixart(path, pixart_facts(width=128, blocks=28, context_width=456), dtype=torch.bfloat16)


def _hunyuandit(path: Path) -> Path:
    facts = hunyuandit_facts(blocks=40, ff=560, context_width=96, t5_width=184, pooled_width=96)
    return make_hunyuandit(path, facts, dtype=torch.bfloat16)


MODELS = {
    "FLUX.1 dev": Model("flux", _flux),
    "SD3.5 large": Model("sd3", _sd3),
    "PixArt-Σ": Model("pixart", _pixart),
    "HunyuanDiT 1.2": Model("hunyuandit", _hunyuandit),
}


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/exactness.md.")
@click.option("--only", default="", help="Models whose name begins so.")
def main(write: bool, only: str) -> None:
    """Measures, prints the table, and exits with 1 where a rank holds more than it may."""
    if write and only:
        raise click.UsageError("The document has the table of all models: write it without --only.")
    figures: dict[str, dict[str, float]] = {}
    for name, model in MODELS.items():
        if name.startswith(only):
            with tempfile.TemporaryDirectory() as folder:
                path = model.make(Path(folder) / "model.safetensors")
                figures[name] = {plan: share(Path(folder) / plan, model.family, path, plan) for plan in PLANS}
            click.echo(f"{name}: {figures[name]}", err=True)
    text = table(figures)
    click.echo(text)
    if write:
        rewrite(DOCUMENT, BEGIN, text, END)
    if any(shares[plan] > BOUND for shares in figures.values() for plan in BY_HALF):
        sys.exit(1)


def share(folder: Path, family: str, path: Path, plan: str) -> float:
    """What the rank that holds most under a plan has on its device, over all of the transformer."""
    whole = held(load(family, path, "transformer", torch.device("cpu"), torch.bfloat16).backbone)
    with running(folder, path=path, family=family, dtype="bfloat16", **PLANS[plan], wait=False) as ranks:
        return max(report.weights for report in ranks.ready()) / whole


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as Markdown, a row for each model."""
    rows = [
        f"| {name} | {' | '.join(f'{shares[plan]:.1%}' for plan in PLANS)} |"
        for name, shares in figures.items()
    ]
    return "\n".join([f"| | {' | '.join(PLANS)} |", "|---|" + "---|" * len(PLANS), *rows])


if __name__ == "__main__":
    main()
