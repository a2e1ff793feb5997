"""`python -m bench.start`: how long ranks take to start, forked by the nursery and as programs, and what memory they hold.

A group of two ranks (ulysses 2) of a small Flux on a CPU: the first of a daemon that was just started, then the same after
one of its ranks was killed, so that of all that is timed the model is next to nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from bench.daemon import serving
from xditd.client import Client
from xditd.models.making import make_flux
from xditd.protocol.figures import GroupStatus
from xditd.protocol.messages import PlanRequest

MODEL = "diffusion_models/flux.safetensors"
TWO = PlanRequest(ulysses=2)


def spent(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def ready(client: Client, generation: int) -> GroupStatus:
    """The group, as soon as that generation of it is ready."""
    while True:
        for group in client.status().groups:
            if group.generation == generation and group.state == "ready":
                return group
        time.sleep(0.005)


def measure(folder: Path, nursery: bool, restarts: int) -> list[str]:
    """One row of the table."""
    with serving(
        nursery=nursery, devices__kind="cpu", devices__threads=1, restart__limit=1000,
        restart__backoff=0.001, models__comfyui=str(folder),
    ) as endpoint, Client(endpoint, timeout=60) as client:  # fmt: skip
        begin = time.perf_counter()
        client.load(MODEL, TWO)
        first = time.perf_counter() - begin
        while nursery and client.status().nursery.state != "warm":  # type: ignore[union-attr]
            time.sleep(0.05)
        back, cpu = [], []
        with client.open_run(MODEL, TWO):
            group = ready(client, 1)
            for _ in range(restarts):
                begin = time.perf_counter()
                os.kill(group.ranks[1].pid, signal.SIGKILL)
                group = ready(client, group.generation + 1)
                back.append(time.perf_counter() - begin)
                cpu += [spent(rank.pid) for rank in group.ranks]
                time.sleep(0.3)  # else it counts as failing again and again
            memory = [psutil.Process(rank.pid).memory_full_info() for rank in group.ranks]
        status = client.status()
        daemon = psutil.Process(status.pid).memory_full_info()
        nest = psutil.Process(status.nursery.pid) if nursery else None  # type: ignore[union-attr]
        held = sum(m.pss for m in memory) + (nest.memory_full_info().pss if nest else 0)
        client.unload(MODEL)
        while any(child.pid != (nest and nest.pid) for child in psutil.Process(status.pid).children()):
            time.sleep(0.05)
        alone = nest.memory_full_info() if nest else None
    return [
        "forked" if nursery else "as programs",
        f"{first:.2f} s",
        f"{statistics.median(back):.2f} s ({min(back):.2f}–{max(back):.2f})",
        f"{statistics.median(cpu):.2f} s",
        f"{statistics.mean(m.pss for m in memory) / 2**20:.0f} MiB",
        f"{held / 2**20:.0f} MiB",
        f"{alone.pss / 2**20:.0f} MiB ({alone.uss / 2**20:.0f} its own)" if alone else "–",
        f"{daemon.uss / 2**20:.0f} MiB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarts", type=int, default=5)
    arguments = parser.parse_args()
    head = (
        "ranks", "first group, from an idle start", "group back after a kill", "CPU of a rank until ready",
        "PSS of a rank", "PSS of both and the nursery", "nursery alone", "daemon",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="xditd-bench-") as name:
        make_flux(Path(name) / "models" / MODEL, heads=4, head_dim=32, context_width=256, pooled_width=64)
        print("|", " | ".join(head), "|")
        print("|---" * len(head) + "|")
        for nursery in (True, False):
            print("|", " | ".join(measure(Path(name), nursery, arguments.restarts)), "|", flush=True)


if __name__ == "__main__":
    main()
