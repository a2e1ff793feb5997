"""A pipeline of stages samples as one process does where every step is warm-up, and close to it where one step is.

Real ranks over gloo. Figures are the largest difference over the standard deviation, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank.families import CASES, normal
from tests.rank.pipelines import DIFFUSION, FLOW, Pipeline
from tests.rank.ranks import Ranks, running, tensor_of
from tests.rank.reference import CPU, Reference, error, euler
from xditd.catalog.families import TRANSFORMERS
from xditd.models.making import flux_facts, make_flux
from xditd.protocol import orders
from xditd.rank.noising import noising
from xditd.rank.sampling import Sampling

FLUX = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64, "double_blocks": 2}
TOLERANCE = 1e-5

Velocity = Callable[[torch.Tensor, float, Mapping[str, torch.Tensor]], torch.Tensor]


class World(Pipeline):
    """Running ranks of a pipeline, and plain diffusers with the same weights."""

    def __init__(self, name: str, ranks: Ranks, sizes: Any, conditioning: Any, velocity: Velocity) -> None:
        super().__init__(ranks)
        self.name = name
        self.sizes = sizes
        self.conditioning = conditioning
        self.velocity = velocity

    def expected(
        self, noise: torch.Tensor, given: Mapping[str, torch.Tensor], sigmas: Any = FLOW
    ) -> torch.Tensor:
        return euler(lambda x, t: self.velocity(x, t, given), list(sigmas), noise)


def flux(folder: Path) -> tuple[Path, Any, Any, Velocity]:
    path = make_flux(folder / "model.safetensors", **FLUX, dtype=torch.float32)
    reference = Reference(path, flux_facts(**FLUX))

    def conditioning(text: int) -> dict[str, torch.Tensor]:
        return {"context": normal(1, text, 256, seed=text), "pooled": normal(1, 64, seed=text + 1)}

    def velocity(x: torch.Tensor, t: float, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return reference.predict(x, t, given["context"], given["pooled"], 3.5)

    return path, ((32, 32), (33, 47), (18, 22)), conditioning, velocity


def other(name: str) -> Callable[[Path], tuple[Path, Any, Any, Velocity]]:
    case = CASES[name]

    def make(folder: Path) -> tuple[Path, Any, Any, Velocity]:
        path = case.make(folder / "model.safetensors")
        predict = case.reference(path)
        return (
            path,
            case.sizes,
            case.conditioning,
            lambda x, t, given: predict(x, torch.tensor([1000 * t]), given),
        )

    return make


MODELS = {"flux": flux, "sd3.5_medium": other("sd3.5_medium"), "sd3": other("sd3")}
DEGREES = {"pipefusion2": (1, 2), "pipefusion4": (1, 4), "pipefusion3": (1, 3), "cfg2-pipefusion2": (2, 2)}
PARAMS = [
    pytest.param((name, degrees), id=f"{name}-{degrees}", marks=marks)
    for name, degrees, marks in (
        ("flux", "pipefusion2", []),
        ("sd3.5_medium", "pipefusion2", [pytest.mark.soak]),
        ("sd3", "pipefusion2", [pytest.mark.soak]),
        ("flux", "pipefusion3", [pytest.mark.soak]),
        ("flux", "cfg2-pipefusion2", [pytest.mark.soak]),
        ("sd3.5_medium", "pipefusion4", [pytest.mark.soak]),
    )
]


@pytest.fixture(scope="module", params=PARAMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name, degrees = request.param
    cfg, stages = DEGREES[degrees]
    folder = tmp_path_factory.mktemp("w")
    path, sizes, conditioning, velocity = MODELS[name](folder)
    family = name.partition(".")[0]
    with running(folder, path=path, family=family, cfg=cfg, pipefusion=stages) as ranks:
        yield World(f"{name}, {degrees}", ranks, sizes, conditioning, velocity)


def test_a_pipeline_is_exact_where_every_step_is_warm_up(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for run, (text, size) in enumerate(zip((15, 77, 31), world.sizes, strict=True), 1):
        given, noise = world.conditioning(text), normal(1, 16, *size, seed=run)
        world.ranks.condition(run, "c", given)
        figures.append(error(world.sample(run, noise, warmup=6), world.expected(noise, given)))
        world.ranks.send(orders.ForgetRun(run=run))
    with capsys.disabled():
        print(f"\n  {world.name}, warm-up 6 of 6: " + ", ".join(f"{f:.1e}" for f in figures), end="")
    assert max(figures) < TOLERANCE


@pytest.mark.soak
def test_a_pipeline_is_the_closer_the_finer_its_steps_are(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one step of warm-up: what is remembered is a step old, and nothing else is wrong."""
    given, noise = world.conditioning(31), normal(1, 16, *world.sizes[0], seed=5)
    world.ranks.condition(9, "c", given)
    figures = {}
    for steps, patches in ((6, 0), (6, 5), (24, 0), (48, 0)):
        sigmas = torch.linspace(1, 0, steps + 1).tolist()
        sampled = world.sample(9, noise, sigmas, patches=patches)
        figures[steps, patches] = error(sampled, world.expected(noise, given, sigmas))
    world.ranks.send(orders.ForgetRun(run=9))
    with capsys.disabled():
        shown = ", ".join(
            f"{n} steps{f' of {p} patches' if p else ''} {f:.1e}" for (n, p), f in figures.items()
        )
        print(f"\n  {world.name}, warm-up 1: {shown}", end="")
    assert 1e-4 < figures[48, 0] < 0.7 * figures[24, 0] < 0.5 * figures[6, 0]


def test_a_guided_pipeline_is_exact_too(world: World) -> None:
    positive, negative = world.conditioning(31), world.conditioning(15)
    noise, scale = normal(1, 16, *world.sizes[-1], seed=7), 3.0
    world.ranks.condition(3, "c", positive)
    world.ranks.condition(3, "n", negative)
    latent = world.sample(3, noise, warmup=6, negative="n", cfg=scale)
    world.ranks.send(orders.ForgetRun(run=3))

    def guided(x: torch.Tensor, t: float) -> torch.Tensor:
        cond, uncond = (world.velocity(x, t, given) for given in (positive, negative))
        return uncond + (cond - uncond) * scale

    assert error(latent, euler(guided, list(FLOW), noise)) < TOLERANCE


def test_runs_interleave_and_one_that_is_cancelled_leaves_nothing_behind(world: World) -> None:
    """Three runs take turns in no order; the second is given up half-way, and what is under way of it is no one's."""
    texts, noises = (31, 15, 77), [normal(1, 16, *size, seed=i) for i, size in enumerate(world.sizes)]
    alone = []
    for run, (text, noise) in enumerate(zip(texts, noises, strict=True), 11):
        world.ranks.condition(run, "c", world.conditioning(text))
        alone.append(world.sample(run, noise))
        world.begin(run, noise)
    done: dict[int, torch.Tensor] = {}
    steps = {11: 0, 12: 0, 13: 0}
    for run in (11, 12, 12, 13, 11, 12, 0, 11, 13, 13, 11, 11, 13, 13, 11, 13):
        if run == 0:
            world.ranks.send(orders.ForgetRun(run=12))
            continue
        _, outputs, _ = world.step(run, steps[run])
        steps[run] += 1
        if outputs:
            done[run] = outputs[0]
    assert torch.equal(done[11], alone[0])
    assert torch.equal(done[13], alone[2])
    for run in (11, 13):
        world.ranks.send(orders.ForgetRun(run=run))


def test_previews_are_those_of_the_step_before(world: World) -> None:
    given, noise = world.conditioning(15), normal(1, 16, *world.sizes[-1], seed=3)
    world.ranks.condition(21, "c", given)
    world.begin(21, noise, warmup=6, preview_frames=True)
    x, before, shown = noise, None, []
    for step in range(6):
        done, _, frames = world.step(21, step)
        x0 = x - FLOW[step] * world.velocity(x, FLOW[step], given)
        x = x + (x - x0) / FLOW[step] * (FLOW[step + 1] - FLOW[step])
        expected = x0 if step == 5 else before
        assert (done.preview is None) == (expected is None)
        if expected is not None and done.preview is not None:
            shown.append(error(tensor_of(done.preview, frames), expected))
        before = x0
    world.ranks.send(orders.ForgetRun(run=21))
    assert len(shown) == 5
    assert max(shown) < TOLERANCE


def test_a_multistep_sampler_is_that_of_one_process(world: World, tmp_path: Path) -> None:
    given, noise = world.conditioning(15), normal(1, 16, *world.sizes[-1], seed=4)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma * world.velocity(x, float(sigma), given)

    loop = Sampling("dpmpp_2m", FLOW, noise, None, denoise)
    for step in range(6):
        loop.step(step)
    world.ranks.condition(22, "c", given)
    latent = world.sample(22, noise, sampler="dpmpp_2m", warmup=6)
    world.ranks.send(orders.ForgetRun(run=22))
    assert error(latent, loop.result()) < TOLERANCE


@pytest.mark.parametrize("name", ["pixart_sigma", "hunyuandit_1.2"])
def test_a_pipeline_takes_out_noise_that_is_no_flow(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network is shown x scaled, and predicts eps or v. With one step of warm-up the result is the closer the finer the
    steps are.

    HunyuanDiT's stages are three, so that skip connections lead through one that takes no part in them.
    """
    case, stages = CASES[name], 3 if name.startswith("hunyuan") else 2
    finer = [*torch.logspace(1.16, -1.0, 48).tolist(), 0.0]
    path = case.make(tmp_path / "model.safetensors")
    kind = noising(TRANSFORMERS[case.family].noise({"sizes": 0}), CPU)
    positive, negative = case.conditioning(31), case.conditioning(15)
    noise = normal(1, 4, *case.sizes[1], seed=1)
    with running(tmp_path, path=path, family=case.family, pipefusion=stages, wait=False) as ranks:
        predict = case.reference(path)

        def x0(x: torch.Tensor, sigma: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            shown, t = kind.shown(x, sigma)
            return kind.denoised(x, predict(shown, t[None], given), sigma)

        def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            without = x0(x, sigma, negative)
            return without + (x0(x, sigma, positive) - without) * 3.0

        def expected(denoise: Any, sigmas: Any = DIFFUSION) -> torch.Tensor:
            loop = Sampling("dpmpp_2m", sigmas, noise, None, denoise, kind)
            for step in range(loop.steps):
                loop.step(step)
            return loop.result()

        single = partial(x0, given=positive)
        alone, both = expected(single), expected(guided)
        ranks.ready()
        pipeline = Pipeline(ranks)
        ranks.condition(1, "c", positive)
        ranks.condition(1, "n", negative)
        asked = {"sampler": "dpmpp_2m", "warmup": 6}
        exact = error(pipeline.sample(1, noise, DIFFUSION, **asked), alone)
        again = error(pipeline.sample(1, noise, DIFFUSION, **asked, negative="n", cfg=3.0), both)
        near = error(pipeline.sample(1, noise, DIFFUSION, sampler="dpmpp_2m"), alone)
        nearer = error(pipeline.sample(1, noise, finer, sampler="dpmpp_2m"), expected(single, finer))
    with capsys.disabled():
        print(
            f"\n  {name}, pipefusion {stages}, dpmpp_2m, warm-up 6 of 6: {exact:.1e}, guided {again:.1e}; 1 of 6: "
            f"{near:.1e}; 1 of 48: {nearer:.1e}",
            end="",
        )
    assert max(exact, again) <= TOLERANCE
    assert TOLERANCE < nearer < 0.7 * near
