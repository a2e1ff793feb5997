"""Plans by which ranks hold less: real ranks sample what one process samples, with LoRAs and without.

Figures are the largest difference over the standard deviation, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_storage import rounded
from tests.rank.ranks import Ranks, framed, running
from tests.rank.reference import CPU, error, euler
from xditd.models.families import load
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.models.reading import held
from xditd.protocol import orders
from xditd.protocol.orders import Merge

FLUX = {
    "heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64, "double_blocks": 4, "single_blocks": 4,
}  # fmt: skip
SIGMAS = (1.0, 0.75, 0.5, 0.0)
TOLERANCE = 1e-5

PLANS = {
    "ulysses2-layerwise": ({"ulysses": 2}, {"offload": "layerwise"}),
    "ulysses2-shard": ({"ulysses": 2}, {"shard": True}),
    "ring2-shard": ({"ring": 2}, {"shard": True}),
    "cfg2-ulysses2-shard": ({"cfg": 2, "ulysses": 2}, {"shard": True}),
    "ring3-shard": ({"ring": 3}, {"shard": True}),
    "ring2-model": ({"ring": 2}, {"offload": "model"}),
    "tensor2-layerwise": ({"tensor": 2}, {"offload": "layerwise"}),
    "cfg2-layerwise": ({"cfg": 2}, {"offload": "layerwise"}),
    "pipefusion2-layerwise": ({"pipefusion": 2}, {"offload": "layerwise"}),
    "pipefusion2-model": ({"pipefusion": 2}, {"offload": "model"}),
    "ulysses2-fp8": ({"ulysses": 2}, {"weight_dtype": "float8_e4m3fn"}),
    "ring2-fp8-layerwise": ({"ring": 2}, {"weight_dtype": "float8_e4m3fn", "offload": "layerwise"}),
    "tensor2-fp8": ({"tensor": 2}, {"weight_dtype": "float8_e4m3fn"}),
    "tensor2-fp8-layerwise": ({"tensor": 2}, {"weight_dtype": "float8_e4m3fn", "offload": "layerwise"}),
    "cfg2-fp8": ({"cfg": 2}, {"weight_dtype": "float8_e4m3fn"}),
    "pipefusion2-fp8": ({"pipefusion": 2}, {"weight_dtype": "float8_e4m3fn"}),
    "pipefusion2-fp8-model": ({"pipefusion": 2}, {"weight_dtype": "float8_e4m3fn", "offload": "model"}),
}
QUICK = ("ulysses2-layerwise", "ulysses2-shard", "ulysses2-fp8")


@dataclass
class World:
    """Running ranks under a plan, and the same network whole in this process."""

    name: str
    sharing: int  # ranks that split a sequence
    ranks: Ranks
    ready: list[orders.RankReady]
    network: Any
    lora: Path


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.soak]) for name in PLANS],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    degrees, plan = PLANS[request.param]
    folder = tmp_path_factory.mktemp("w")
    path = make_flux(folder / "flux.safetensors", **FLUX, dtype=torch.float32)
    lora = make_lora(folder / "lora.safetensors", "flux", flux_facts(**FLUX))
    with running(folder, path=path, **degrees, plan=plan, wait=False) as ranks:
        # What is kept in fp8 is held against what has been rounded to it in its file.
        weights = rounded(path, plan["weight_dtype"]) if "weight_dtype" in plan else path
        network = load("flux", weights, "transformer", CPU, torch.float32)
        sharing = degrees.get("ulysses", 1) * degrees.get("ring", 1)
        yield World(request.param, sharing, ranks, ranks.ready(), network, lora)


def given(text: int, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(text)
    return {
        "context": torch.randn(batch, text, FLUX["context_width"], generator=generator),
        "pooled": torch.randn(batch, FLUX["pooled_width"], generator=generator),
    }


def sample(world: World, run: int, noise: torch.Tensor, singly: bool) -> torch.Tensor:
    (described,), frames = framed([noise])
    begin = orders.BeginSample(
        run=run, sampler="euler", sigmas=SIGMAS, noise=described, latent=None, conditioning="c", negative=None,
        cfg=1.0, out=None, previews=(), preview_frames=False, warmup=len(SIGMAS), singly=singly,
    )  # fmt: skip
    world.ranks.send(begin, *frames)
    for step in range(len(SIGMAS) - 1):
        _, outputs = world.ranks.turn(orders.TurnSample(order=step, run=run, step=step))
    world.ranks.send(orders.ForgetRun(run=run))
    return outputs[0]


@pytest.mark.parametrize("singly", [False, True], ids=["at_once", "item_by_item"])
def test_it_samples_what_one_process_samples(
    world: World, singly: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if singly and "pipefusion" in world.name:
        pytest.skip("a pipeline's batch is not split")
    tensors, noise = given(15, 2), torch.randn(2, 16, 18, 22, generator=torch.Generator().manual_seed(7))
    figures = []
    for run, merges in enumerate(((), (Merge(path=str(world.lora), strength=0.7),), ())):
        world.network.loras.hold(merges)
        with torch.no_grad():
            conditioning = world.network.condition(tensors, {})
            expected = euler(
                lambda x, t, given=conditioning: world.network.predict(x, torch.full((2,), t), given),
                list(SIGMAS),
                noise,
            )
        world.ranks.send(orders.SetLoras(run=run, loras=merges))
        world.ranks.condition(run, "c", tensors)
        figures.append(error(sample(world, run, noise, singly), expected))
    with capsys.disabled():
        shown = ", ".join(f"{figure:.1e}" for figure in figures)
        print(f"\n  {world.name}: {shown} (without, with and without a LoRA)", end="")
    assert max(figures) < TOLERANCE


def test_a_rank_tells_what_it_has_on_its_device(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    whole = held(world.network.backbone)
    shares = [(report.weights / whole, report.host_weights / whole) for report in world.ready]
    with capsys.disabled():
        print("\n  " + ", ".join(f"{here:.0%} on a device, {host:.0%} in the host" for here, host in shares))
    if "shard" in world.name:
        assert max(here for here, _ in shares) < 1 / world.sharing + 0.05
    if "layerwise" in world.name:
        assert max(here for here, _ in shares) < 0.5
    elif "fp8" in world.name and "model" not in world.name:
        assert max(here for here, _ in shares) < 0.55, "a quarter of float32, and one layer as it is computed"


def test_it_sleeps_and_wakes(world: World) -> None:
    noise = torch.randn(1, 16, 18, 22)
    results = []
    for run in (10, 11):
        world.ranks.condition(run, "c", given(15, 1))
        results.append(sample(world, run, noise, False))
        for order in (orders.Sleep(), orders.Wake()):
            world.ranks.send(order)
            for _ in world.ready:
                world.ranks.wait(orders.RankRested)
    assert error(*results) < 1e-6
