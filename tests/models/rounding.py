"""What a prediction in bfloat16 is off one in float32: ours, and plain diffusers' own, whose error is the floor; and the table of it.

    python -m tests.models.rounding [--write]

Small models, whose files are in bfloat16 already, so that all computes with the same weights; one call on one device. The figures are the
root mean square of the difference, over the standard deviation of what is right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from bench.document import rewrite
from tests.rank.families import CASES, CPU, Case, Predict, computing, normal
from tests.rank.reference import Reference
from xditd.models.families import load
from xditd.models.making import flux_facts, make_flux

DOCUMENT = Path(__file__).parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- rounding: made by tests.models.rounding -->", "<!-- /rounding -->"
BOUND = 2
"""How many times the floor ours may be."""

TEXT = 15
GUIDANCE = 4.0
SHAPE = {"heads": 4, "head_dim": 32, "context_width": 64, "pooled_width": 32}

Figures = dict[tuple[int, int], tuple[float, float]]
"""By size of a latent: of ours, and the floor."""


def _flux() -> Case:
    def make(path: Path) -> Path:
        return make_flux(path, **SHAPE, dtype=torch.float32)

    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Predict:
        plain = Reference(path, flux_facts(**SHAPE))
        plain.module.to(dtype)

        def predict(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return plain.predict(x, float(t), given["context"], given["pooled"], GUIDANCE)

        return computing(dtype, predict)

    def conditioning(text: int) -> dict[str, torch.Tensor]:
        return {"context": normal(1, text, 64, seed=text), "pooled": normal(1, 32, seed=text + 1)}

    return Case("flux", make, conditioning, reference, t=0.5, predicts="flow")


ALL = {"flux": _flux(), **CASES}


def compare(name: str, folder: Path) -> Figures:
    """One case, at all of its sizes. Its time is one that bfloat16 has, too: that diffusers rounds others is no floor of arithmetic."""
    case = ALL[name]
    path = folder / "bf16.safetensors"
    weights = load_file(case.make(folder / "made.safetensors"))
    save_file({key: value.bfloat16() for key, value in weights.items()}, path)
    right, theirs = case.reference(path), case.reference(path, torch.bfloat16)
    network = load(case.family, path, "transformer", CPU, torch.bfloat16)
    given, t = case.conditioning(TEXT), torch.tensor([case.t])
    figures: Figures = {}
    with torch.no_grad():
        for size in case.sizes:
            x = normal(1, case.channels, *size)
            expected = right(x, t, given)
            ours = network.predict(x, t, network.condition(given, {"guidance": GUIDANCE}))
            figures[size] = off(ours, expected), off(theirs(x, t, given), expected)
    return figures


def off(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.float() - expected).square().mean().sqrt() / expected.std())


def table(figures: dict[str, Figures]) -> str:
    """The figures as Markdown, a row for each case and size."""
    rows = [
        f"| {name.replace('_', ' ')} | {size[0]}×{size[1]} | {ours:.1e} | {floor:.1e} | {ours / floor:.2f} |"
        for name, of_one in figures.items()
        for size, (ours, floor) in of_one.items()
    ]
    return "\n".join(
        ["| model | latent | ours | diffusers | ours / diffusers |", "|---|---|---|---|---|", *rows]
    )


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/exactness.md.")
def main(write: bool) -> None:
    """Compares, prints the table, and exits with 1 where ours is further off than it may be."""
    torch.set_num_threads(1)
    figures = {}
    for name in ALL:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = compare(name, Path(folder))
    click.echo(table(figures))
    if write:
        rewrite(DOCUMENT, BEGIN, table(figures), END)
    if any(ours > BOUND * floor for of_one in figures.values() for ours, floor in of_one.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
