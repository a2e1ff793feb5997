"""Hundreds of runs over changing sizes, texts and LoRAs in one group, some given up half-way: nothing grows on any rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.rank.families import normal
from tests.rank.ranks import Ranks, framed, running
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.protocol import orders

FLUX = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64}
SIGMAS = (1.0, 0.8, 0.6, 0.3, 0.0)
LARGEST = 33
RUNS, SETTLED = 400, 200
"""Runs in all, and those after which caches by size are full and allocators have what they want."""

PLANS: dict[str, dict[str, Any]] = {
    "ulysses2": {"ulysses": 2},
    "tensor2": {"tensor": 2},
    "cfg2": {"cfg": 2},
    "pipefusion2": {"pipefusion": 2},
    "ulysses2-shard": {"ulysses": 2, "plan": {"shard": True}},
    "ulysses2-layerwise": {"ulysses": 2, "plan": {"offload": "layerwise"}},
    "pipefusion2-layerwise": {"pipefusion": 2, "plan": {"offload": "layerwise"}},
    "ulysses2-model": {"ulysses": 2, "plan": {"offload": "model"}},
}


def sample(ranks: Ranks, run: int, chance: random.Random, lora: Path) -> bool:
    """One run of any size, text, guidance and patches, with a LoRA or without. Whether it went to its end."""
    strength = chance.choice((0.0, 0.0, 0.7, -0.3))
    merges = (orders.Merge(path=str(lora), strength=strength),) if strength else ()
    ranks.send(orders.SetLoras(run=run, loras=merges))
    size = chance.randrange(8, LARGEST + 1), chance.randrange(8, LARGEST + 1)
    if run == 1:  # from 64 KiB of an answer on, pyzmq has a context and a thread more: once
        size = LARGEST, LARGEST
    for key in ("c", "n"):
        text = chance.randrange(2, 80)
        given = {"context": normal(1, text, 256, seed=text), "pooled": normal(1, 64, seed=text)}
        ranks.condition(run, key, given)
    guided = chance.random() < 0.5
    (described,), frames = framed([normal(1, 16, *size, seed=run)])
    ranks.send(
        orders.BeginSample(
            run=run, sampler="euler", sigmas=SIGMAS, noise=described, latent=None, conditioning="c",
            negative="n" if guided else None, cfg=2.0 if guided else 1.0, out=None, previews=(),
            preview_frames=chance.random() < 0.2, warmup=chance.randrange(1, 4), patches=chance.randrange(0, 5),
        ),
        *frames,
    )  # fmt: skip
    steps = len(SIGMAS) - 1 if chance.random() < 0.8 or run == 1 else chance.randrange(1, len(SIGMAS) - 1)
    outputs: list[torch.Tensor] = []
    for step in range(steps):
        _, outputs = ranks.turn(orders.TurnSample(order=run * 10 + step, run=run, step=step))
    ranks.send(orders.ForgetRun(run=run))
    return bool(outputs) and bool(outputs[0].isfinite().all())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", PLANS)
def test_hundreds_of_mixed_runs_leave_a_group_as_it_was(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_flux(tmp_path / "flux.safetensors", **FLUX, dtype=torch.float32)
    lora = make_lora(tmp_path / "lora.safetensors", "flux", flux_facts(**FLUX))
    chance = random.Random(7)
    with running(tmp_path, path=path, **PLANS[kind]) as ranks:
        processes = [psutil.Process(process.pid) for process in ranks.processes]

        def held() -> list[tuple[int, int, int]]:
            return [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]

        ended = sum(sample(ranks, run, chance, lora) for run in range(1, SETTLED + 1))
        before = held()
        ended += sum(sample(ranks, run, chance, lora) for run in range(SETTLED + 1, RUNS + 1))
        after = held()
    grown = [
        tuple(now - then for now, then in zip(b, a, strict=True)) for a, b in zip(before, after, strict=True)
    ]
    with capsys.disabled():
        told = ", ".join(
            f"{rss / 2**20:+.1f} MiB {fds:+d} descriptors {threads:+d} threads" for rss, fds, threads in grown
        )
        print(f"\n  {kind}, runs {SETTLED} to {RUNS}, of all {ended} to their end: {told}", end="")
    assert 0.7 * RUNS < ended < 0.9 * RUNS
    assert all(rss < 16 << 20 and fds <= 0 and threads <= 0 for rss, fds, threads in grown)
