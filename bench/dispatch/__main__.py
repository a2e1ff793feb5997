"""`python -m bench.dispatch`: prints the figures of docs/benchmarks.md, as Markdown."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import click

from bench import machine
from bench.daemon import serving
from bench.dispatch import rank, watched
from bench.dispatch.swarm import Swarm, jain, swarm
from xditd.client import Client
from xditd.protocol.messages import PlanRequest

FOUR = {
    "debug__echo": True,
    "devices__kind": "cpu",
    "devices__cpu_ranks": 4,
    "devices__threads": 1,
    "arena__first_bytes": 1 << 16,
    "limits__queue": 4096,
}
"""A daemon of four devices, each a replica."""

POLICIES = ("round_robin", "least_loaded", "weighted_round_robin", "adaptive")


@click.command()
@click.option("--clients", default=100, show_default=True)
@click.option("--runs", default=20, show_default=True, help="Of each client.")
@click.option("--steps", default=5, show_default=True, help="Of each run.")
@click.option("--turn", default=0.005, show_default=True, help="Seconds of a turn in the ranks.")
@click.option("--small", is_flag=True, help="A few clients: to try this script, not to quote.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Every single time, for programs.")
def main(clients: int, runs: int, steps: int, turn: float, small: bool, json_file: Path | None) -> None:
    """Many clients on four equal replicas, and then a few on four of which one is three times slower."""
    if small:
        clients, runs, steps = 10, 3, 2
    for name, value in machine.describe("pyzmq").items():
        click.echo(f"- {name}: {value}")
    crowd, seen = crowded(clients, runs, steps, turn)
    click.echo("\n".join(["", *crowd_table(crowd, clients, runs, steps, turn), "", *time_table(seen), ""]))
    slow = {policy: uneven(policy, *((8, 3, 2) if small else (16, 20, 4))) for policy in POLICIES}
    click.echo("\n".join(uneven_table(slow)))
    if json_file:
        json_file.write_text(json.dumps(seen), encoding="utf-8")


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def crowded(clients: int, runs: int, steps: int, turn: float) -> tuple[Swarm, dict[str, Any]]:
    plan = PlanRequest(replicas=4, scheduling="least_loaded")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seen.json")
        with (
            environment(**{watched.VARIABLE: str(path)}),
            serving(
                "bench.dispatch.watched", **FOUR, debug__rank_options__turn_seconds=str(turn)
            ) as endpoint,
            Client(endpoint, name="bench", timeout=60) as client,
        ):
            client.load("echo/echo", plan)
            result = swarm(endpoint, clients, runs, steps, plan)
        return checked(result), json.loads(path.read_text(encoding="utf-8"))


def uneven(policy: str, clients: int, runs: int, steps: int) -> Swarm:
    """One replica of four is three times slower: clients ask for whole samples, so that the ranks set the pace."""
    plan = PlanRequest(replicas=4, scheduling=policy)
    turns = ",".join(f"cpu:{index}={0.06 if index == 3 else 0.02}" for index in range(4))
    command = [sys.executable, "-m", "bench.dispatch.rank"]
    with (
        environment(**{rank.VARIABLE: turns}),
        serving(**FOUR, debug__rank_command=command) as endpoint,
        Client(endpoint, name="bench", timeout=60) as client,
    ):
        client.load("echo/echo", plan)
        return checked(swarm(endpoint, clients, runs, steps, plan, whole=True))


def checked(result: Swarm) -> Swarm:
    if result.wrong:
        raise click.ClickException(f"{len(result.wrong)} faults, the first: {result.wrong[0]}")
    return result


def crowd_table(crowd: Swarm, clients: int, runs: int, steps: int, turn: float) -> list[str]:
    fair = jain([runs / seconds for seconds in crowd.seconds])
    ideal = clients * runs * steps * turn / 4
    return [
        "| what | figure |",
        "|---|---|",
        f"| clients × runs × steps of {turn * 1e3:g} ms, on 4 replicas | {clients} × {runs} × {steps} |",
        f"| runs that ended right | {sum(crowd.groups.values())} of {clients * runs} |",
        f"| runs by replica | {', '.join(str(n) for _, n in sorted(crowd.groups.items()))} |",
        f"| all done after | {crowd.makespan:.1f} s (the turns alone: {ideal:.1f} s) |",
        f"| Jain's fairness of the clients' runs per second | {fair:.4f} |",
    ]


def time_table(seen: dict[str, Any]) -> list[str]:
    rows = [
        "| CPU time of the daemon's thread, ms | times | median | 99 % | longest |",
        "|---|---|---|---|---|",
    ]
    rows += [_row(name, values) for name, values in seen["times"].items() if values]
    # The first callback is the daemon's start, before anybody can ask it for anything.
    callbacks = {name: values[1:] for name, values in seen["callbacks"].items()}
    starts = [bool(number) for number in callbacks["spawned"]]
    serves = [not start for start in starts]
    rows.append(_row("a callback of the event loop", list(compress(callbacks["cpu"], serves))))
    on_the_wall = list(compress(callbacks["wall"], serves))
    rows.append(_row("the same on the wall, with whoever had the core meanwhile", on_the_wall))
    rows.append(_row("a callback that starts ranks", list(compress(callbacks["cpu"], starts))))
    return rows


def _row(name: str, values: Sequence[float]) -> str:
    ordered = sorted(values)
    figures = statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]
    return f"| {name} | {len(ordered)} | {' | '.join(f'{figure * 1e3:.3f}' for figure in figures)} |"


def uneven_table(slow: dict[str, Swarm]) -> list[str]:
    rows = [
        "| scheduling, one replica of four three times slower | all done after | runs by replica, the slow one last "
        "| round_robin takes |",
        "|---|---|---|---|",
    ]
    for policy, result in slow.items():
        by_group = ", ".join(str(n) for _, n in sorted(result.groups.items()))
        times = slow["round_robin"].makespan / result.makespan
        rows.append(f"| {policy} | {result.makespan:.1f} s | {by_group} | {times:.2f} × |")
    return rows


if __name__ == "__main__":
    main()
