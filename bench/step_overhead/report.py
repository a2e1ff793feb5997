"""The table of a step, for people (rich) and for docs/benchmarks.md (Markdown)."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.spread import ratios, spread
from bench.step_overhead.alternate import Times
from bench.step_overhead.contenders import Bare, Daemon

TARGET = 0.01
"""The whole path may cost so much more than the bare forward pass, as a share of it."""

HEAD = ("", "ms", "÷ bare forward", "rounds")


def rows(times: Times) -> list[tuple[str, ...]]:
    """A row for each contender; ratios are of the same round."""
    reference = times[Bare.name]
    return [
        (
            name,
            spread(values).text(digits=5, factor=1e3),
            "–" if name == Bare.name else ratios(values, reference).text(digits=5),
            str(len(values)),
        )
        for name, values in times.items()
    ]


def verdict(times: Times) -> str:
    """One sentence: what the whole path adds, and whether that is within the target."""
    reference = times[Bare.name]
    added = ratios(times[Daemon.name], reference).median - 1
    milliseconds = spread([ours - bare for ours, bare in zip(times[Daemon.name], reference, strict=True)])
    return (
        f"{'✅' if added <= TARGET else '❌'} client, daemon and hand-off add {milliseconds.text(factor=1e3)} ms to a "
        f"step: {added:.2%} of the bare forward pass (target ≤ {TARGET:.0%})"
    )


def show(console: Console, times: Times, facts: dict[str, str]) -> None:
    for name, value in facts.items():
        console.print(f"{name}: {value}")
    table = Table(title="One denoising step: median (quartiles)")
    for heading in HEAD:
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows(times):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(times))


def markdown(times: Times, facts: dict[str, str]) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"| {' | '.join(HEAD)} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(times)]
    return "\n".join([*lines, "", verdict(times)]) + "\n"
