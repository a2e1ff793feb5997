"""Hundreds of runs over changing sizes and texts in one group, some given up half-way: nothing grows on any rank."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest
import torch

from tests.rank.families import normal
from tests.rank.ranks import Ranks, framed, running
from xditd.models.making import make_flux
from xditd.protocol import orders

FLUX = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64}
SIGMAS = (1.0, 0.8, 0.6, 0.3, 0.0)
RUNS, SETTLED = 300, 100
"""Runs in all, and those after which caches by size are full and allocators have what they want."""

DEGREES = {
    "ulysses2": {"ulysses": 2},
    "tensor2": {"tensor": 2},
    "cfg2": {"cfg": 2},
    "pipefusion2": {"pipefusion": 2},
}


def sample(ranks: Ranks, run: int, chance: random.Random) -> bool:
    """One run of any size, text, guidance and patches. Whether it went to its end."""
    size = chance.randrange(8, 34), chance.randrange(8, 34)
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
    steps = len(SIGMAS) - 1 if chance.random() < 0.8 else chance.randrange(1, len(SIGMAS) - 1)
    outputs: list[torch.Tensor] = []
    for step in range(steps):
        _, outputs = ranks.turn(orders.TurnSample(order=run * 10 + step, run=run, step=step))
    ranks.send(orders.ForgetRun(run=run))
    return bool(outputs) and bool(outputs[0].isfinite().all())


@pytest.mark.soak
@pytest.mark.parametrize("kind", DEGREES)
def test_hundreds_of_mixed_runs_leave_a_group_as_it_was(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_flux(tmp_path / "flux.safetensors", **FLUX, dtype=torch.float32)
    chance = random.Random(7)
    with running(tmp_path, path=path, **DEGREES[kind]) as ranks:
        processes = [psutil.Process(process.pid) for process in ranks.processes]

        def held() -> list[tuple[int, int, int]]:
            return [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]

        ended = sum(sample(ranks, run, chance) for run in range(1, SETTLED + 1))
        before = held()
        ended += sum(sample(ranks, run, chance) for run in range(SETTLED + 1, RUNS + 1))
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
