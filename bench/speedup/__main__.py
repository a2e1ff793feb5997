"""What a second rank gains under every strategy, on a CPU: one thread each, gloo, one daemon, rounds in turn.

    python -m bench.speedup                # prints; five minutes on two quiet cores, longer on busy ones
    python -m bench.speedup --write        # into docs/benchmarks.md

A Flux of 139 million parameters in float32 (530 MiB) samples 4 guided steps: two calls each, so that cfg has something to share out. Every plan
has a group of its own, all of one daemon; in each round every plan samples once, one after the other, and the ratio is of the two in the
same round. What a GPU gains is another matter: its links are faster, and its arithmetic by far.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.daemon import serving
from bench.document import rewrite
from bench.machine import describe
from bench.spread import ratios, spread
from xditd.client import Client, Run
from xditd.models.making import flux_facts, make_flux
from xditd.protocol.messages import PlanRequest

FLUX = {"heads": 8, "head_dim": 128, "double_blocks": 2, "single_blocks": 4}
LATENT = (1, 16, 40, 40)
TEXT = 128
STEPS = 4
GUIDANCE = 2.0

PLANS = {
    "one device": PlanRequest(devices=("0",)),
    "ulysses 2": PlanRequest(ulysses=2),
    "ring 2": PlanRequest(ring=2),
    "cfg 2": PlanRequest(cfg=2),
    "tensor 2": PlanRequest(tensor=2),
    "pipefusion 2": PlanRequest(pipefusion=2),
}

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by bench.speedup -->", "<!-- /bench.speedup -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    machine = describe("torch", "xfuser")
    seconds = measure(chosen.rounds)
    machine["load at the end"] = describe()["load"].partition(" (")[0]
    text = report(machine, seconds)
    if chosen.write:
        rewrite(DOCUMENT, BEGIN, text, END)
    print(text)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of a sampling under every plan, by round. A first round, which warms everything, is not counted."""
    with tempfile.TemporaryDirectory(prefix="xditd-bench-") as folder:
        make_flux(Path(folder) / "diffusion_models" / "flux.safetensors", **FLUX, dtype=torch.float32)
        settings = {"devices__kind": "cpu", "devices__cpu_ranks": 2, "devices__threads": 1}
        with (
            serving(**settings, models__folders__diffusion_models=[f"{folder}/diffusion_models"]) as endpoint,
            Client(endpoint, timeout=60) as client,
        ):
            seconds: dict[str, list[float]] = {name: [] for name in PLANS}
            for number in range(rounds + 1):
                for name, plan in PLANS.items():
                    with client.open_run("diffusion_models/flux.safetensors", plan) as run:
                        told = sample(run)
                    if number:
                        seconds[name].append(told)
            return seconds


def sample(run: Run) -> float:
    """Seconds of one sampling."""
    facts = flux_facts(**FLUX)
    generator = torch.Generator().manual_seed(7)
    for key in ("positive", "negative"):
        context = torch.randn(1, TEXT, facts["context_width"], generator=generator)
        pooled = torch.randn(1, facts["pooled_width"], generator=generator)
        run.put_conditioning(key, {"context": context, "pooled": pooled}, {"guidance": 3.5})
    noise = torch.randn(LATENT, generator=generator)
    sigmas = torch.linspace(1, 0, STEPS + 1).tolist()
    begun = time.perf_counter()
    run.sample(noise, sigmas, "positive", negative="negative", cfg=GUIDANCE)
    return time.perf_counter() - begun


def report(machine: dict[str, str], seconds: dict[str, list[float]]) -> str:
    lines = [f"- {name}: {fact}" for name, fact in machine.items()]
    lines.append(f"- taken: {time.strftime('%Y-%m-%d')}, rounds: {len(seconds['one device'])}")
    lines += ["", "| plan | a sampling, s | one device takes |", "|---|---|---|"]
    for name, mine in seconds.items():
        gain = "1" if name == "one device" else ratios(seconds["one device"], mine).text()
        lines.append(f"| {name} | {spread(mine).text()} | {gain} × |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
