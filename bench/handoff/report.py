"""The tables: milliseconds and ratios for people (rich), for docs/benchmarks.md (Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.handoff.payloads import PAYLOADS
from bench.handoff.race import Times
from bench.spread import Spread, ratios, spread

OURS = "xditd"
REFERENCES = ("floor", "raw3")


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the ratio `peer / reference`, taken pair by pair."""

    payload: str
    peer: str
    reference: str
    bound: float
    at_most: bool

    def says(self) -> str:
        verb, sign = ("costs", "≤") if self.at_most else ("takes", "≥")
        return f"{self.payload}: {self.peer} {verb} {sign} {self.bound:g} × {self.reference}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


TARGETS = (
    Target("S", OURS, "raw3", 2.0, at_most=True),
    Target("M", "ray", OURS, 10.0, at_most=False),
    Target("M", "http", OURS, 60.0, at_most=False),
    Target("XL", OURS, "floor", 1.5, at_most=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One peer with one payload."""

    payload: str
    peer: str
    time: Spread  # seconds
    against: dict[str, Spread]  # by reference: this peer's time over the reference's, pair by pair


def rows(times: Times) -> list[Row]:
    """A row for each peer and payload, the fastest first. "M again" is compared with what a full M costs others."""
    result = []
    for payload, by_peer in times.items():
        base = times["M"] if PAYLOADS[payload].again and "M" in times else by_peer
        measured = [
            Row(
                payload,
                peer,
                spread(values),
                {
                    name: ratios(values, base[name])
                    for name in (*REFERENCES, OURS)
                    if name in base and name != peer
                },
            )
            for peer, values in by_peer.items()
        ]
        result += sorted(measured, key=lambda row: row.time.median)
    return result


def verdicts(times: Times) -> list[tuple[Target, Spread]]:
    """The targets of which both sides were measured."""
    return [
        (target, ratios(times[target.payload][target.peer], times[target.payload][target.reference]))
        for target in TARGETS
        if {target.peer, target.reference} <= times.get(target.payload, {}).keys()
    ]


_HEAD = ("payload", "stack", "ms", "× floor", "× raw3", f"× {OURS}", "rounds")


def _cells(row: Row) -> tuple[str, ...]:
    columns = (row.against.get(name) for name in (*REFERENCES, OURS))
    return (
        row.payload,
        row.peer,
        row.time.text(factor=1e3),
        *(ratio.text() if ratio else "–" for ratio in columns),
        str(row.time.count),
    )


def show(console: Console, times: Times) -> None:
    table = Table(title="Hand-off, client → daemon → rank → daemon → client: median (quartiles)")
    for name in _HEAD:
        table.add_column(name, justify="left" if name in ("payload", "stack") else "right")
    last = None
    for row in rows(times):
        if last not in (None, row.payload):
            table.add_section()
        last = row.payload
        table.add_row(*_cells(row), style="bold" if row.peer == OURS else "")
    console.print(table)
    for target, ratio in verdicts(times):
        mark = "✅" if target.met(ratio.median) else "❌"
        console.print(f"{mark} {target.says()}: {ratio.text()}")


def markdown(times: Times, machine: dict[str, str], legend: Iterable[tuple[str, str]]) -> str:
    """The same as a section of docs/benchmarks.md."""
    lines = [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", _line(_HEAD), _line("---" for _ in _HEAD)]
    lines += [_line(_cells(row)) for row in rows(times)]
    lines += ["", _line(("target", "measured", "met")), _line(("---", "---", "---"))]
    lines += [
        _line((target.says(), ratio.text(), "yes" if target.met(ratio.median) else "**no**"))
        for target, ratio in verdicts(times)
    ]
    lines += ["", *(f"- **{name}**: {says}." for name, says in legend)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
