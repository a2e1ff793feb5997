"""Holds the planner's model of costs (`xditd/daemon/costs.py`) against published times, and writes the table of it.

    python -m bench.scaling            # prints it
    python -m bench.scaling --write    # into docs/scaling.md

Three predictions for each plan: by the table of devices alone; calibrated by the published time of one device, as a daemon does that
has measured a step there; and that with one constant a table for what no plan shares out, which is fitted. Nothing is run, so no machine is needed, and none is named.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from bench.document import rewrite
from bench.scaling.published import TABLES, Table, degrees
from xditd.daemon.costs import estimate
from xditd.protocol.plans import Plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
BEGIN, END = "<!-- made by bench.scaling -->", "<!-- /bench.scaling -->"
HEAD = (
    "| model | device | pixels | plan | published, s | calibrated, s | error | by tables alone, s | error | "
    "with a constant, s | error | source |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    text = report()
    if parser.parse_args().write:
        rewrite(DOCUMENT, BEGIN, text, END)
    print(text)


def report() -> str:
    """The table, and the errors in a few words."""
    lines = [HEAD, "|" + "---|" * HEAD.count(" |")]
    calibrated: list[float] = []
    alone: list[float] = []
    fitted: list[float] = []
    for table in TABLES:
        rest = unshared(table)
        for name, seconds in table.seconds.items():
            by_one, by_tables = predicted(table, name, known=True), predicted(table, name, known=False)
            alone.append(by_tables / seconds - 1)
            told, off, shifted, left = "–", "–", "–", "–"
            if name != "1":
                calibrated.append(by_one / seconds - 1)
                told, off = f"{by_one:.2f}", f"{calibrated[-1]:+.0%}"
            if name != "1" and rest is not None:
                by_rest = rest + (1 - rest / table.seconds["1"]) * by_one
                fitted.append(by_rest / seconds - 1)
                shifted, left = f"{by_rest:.2f} ({rest:.2f})", f"{fitted[-1]:+.0%}"
            lines.append(
                f"| {table.name} | {table.device} | {table.pixels}² | {name} | {seconds:.2f} | {told} | {off} | "
                f"{by_tables:.2f} | {alone[-1]:+.0%} | {shifted} | {left} | {table.source} |"
            )
    lines += ["", _words("Calibrated by one device", calibrated), "", _words("By tables alone", alone)]
    lines += ["", _words("Calibrated, with a constant fitted to each table", fitted)]
    return "\n".join(lines)


def predicted(table: Table, name: str, known: bool) -> float:
    """Seconds of the picture under a plan; `known`: its time on one device is."""
    shape = degrees(name)
    plan = Plan(devices=tuple(map(str, range(math.prod(shape.values())))), **shape)
    measured = [(Plan(devices=("0",)), table.seconds["1"] / table.steps)] if known else []
    size = (table.pixels, table.pixels)
    found = estimate(table.model, plan, size, "bfloat16", table.device, measured)
    assert found is not None, "every model and device of the tables is in the model of costs"
    return found.seconds * table.steps


def unshared(table: Table) -> float | None:
    """Seconds of a picture that no plan shares out, by which the calibrated model comes nearest to a table (least squares of relative
    errors, to hundredths); None where there are fewer than two plans to fit it to."""
    plans = [name for name in table.seconds if name != "1"]
    if len(plans) < 2:
        return None
    one = table.seconds["1"]

    def miss(rest: float) -> float:
        told = (rest + (1 - rest / one) * predicted(table, name, known=True) for name in plans)
        return sum((t / table.seconds[name] - 1) ** 2 for t, name in zip(told, plans, strict=True))

    return min((i / 100 for i in range(int(100 * one))), key=miss)


def _words(what: str, errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return (
        f"{what}: {len(errors)} figures, median error {statistics.median(errors):+.0%}, median of its size "
        f"{statistics.median(sizes):.0%}, from {min(errors):+.0%} to {max(errors):+.0%}."
    )


if __name__ == "__main__":
    main()
