"""`python -m bench.handoff`: races xditd and its peers, prints ratios, writes JSON and Markdown."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.handoff import report
from bench.handoff.payloads import PAYLOADS
from bench.handoff.peers import Peer, Unavailable
from bench.handoff.peers.floor import Floor
from bench.handoff.peers.http_json import HttpJson
from bench.handoff.peers.raw3 import Raw3
from bench.handoff.peers.ray_actor import RayActor
from bench.handoff.peers.xditd import Xditd
from bench.handoff.peers.zmq_pickle import ZmqPickle
from bench.handoff.race import race, rounds_of

PEERS: tuple[type[Peer], ...] = (Floor, Raw3, Xditd, ZmqPickle, RayActor, HttpJson)


@click.command()
@click.option(
    "--rounds", default=100, show_default=True, help="Rounds of payload S; M takes half, XL a tenth."
)
@click.option(
    "--only", multiple=True, type=click.Choice([peer.name for peer in PEERS]), help="Only these peers."
)
@click.option("--payload", multiple=True, type=click.Choice(list(PAYLOADS)), help="Only these payloads.")
@click.option(
    "--patience",
    default=300.0,
    show_default=True,
    help="Seconds that turns wait in all for a quiet machine; 0 does not look.",
)
@click.option("--seed", default=0, help="Of the contents and of the order within a round.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Every single time, for programs.")
@click.option(
    "--markdown", "markdown_file", type=click.Path(path_type=Path), help="The tables, for the docs."
)
@click.option("--check", is_flag=True, help="Exit with 1 where a target is missed.")
def main(
    rounds: int,
    only: tuple[str, ...],
    payload: tuple[str, ...],
    patience: float,
    seed: int,
    json_file: Path | None,
    markdown_file: Path | None,
    check: bool,
) -> None:
    """Races the hand-off of xditd and of its peers."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has room for the table
    torch.set_num_threads(1)  # one core copies, in every peer alike
    payloads = [PAYLOADS[name] for name in (payload or PAYLOADS)]
    facts = machine.describe("torch", "pyzmq", "ray")
    with ExitStack() as stack:
        peers = _started([peer() for peer in PEERS if not only or peer.name in only], stack, console)
        turns = sum(
            rounds_of(each, rounds) * sum(each.travels in peer.payloads for peer in peers)
            for each in payloads
        )
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("racing", total=turns)
            quiet = machine.Quiet(patience)
            times = race(peers, payloads, rounds, seed, quiet, lambda: progress.advance(task))
    facts["quiet"] = f"{turns - quiet.missed} of {turns} turns began while nobody else used the machine"
    report.show(console, times)
    if json_file:
        json_file.write_text(json.dumps({"machine": facts, "seconds": times}, indent=1), encoding="utf-8")
    if markdown_file:
        legend = [(peer.name, peer.says) for peer in peers] + [(each.name, each.says) for each in payloads]
        markdown_file.write_text(report.markdown(times, facts, legend), encoding="utf-8")
    if check and not all(target.met(ratio.median) for target, ratio in report.verdicts(times)):
        raise SystemExit(1)


def _started(peers: list[Peer], stack: ExitStack, console: Console) -> list[Peer]:
    """Those that run here; the others are named with their reason. `stack` ends them all."""
    running = []
    for peer in peers:
        stack.callback(peer.stop)
        try:
            peer.start()
        except Unavailable as reason:
            console.print(f"⚠️  {peer.name} is left out: {reason}")
        else:
            running.append(peer)
    return running


if __name__ == "__main__":
    main()
