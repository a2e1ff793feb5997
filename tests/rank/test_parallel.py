"""A world of ranks computes what one process computes: any text length, any image size, any split.

Real ranks with real xfuser over gloo. Figures are the largest difference over the standard deviation, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.rank.ranks import Ranks, check_weights, framed, running
from tests.rank.reference import Reference, error, euler
from xditd.models.making import flux_facts, make_flux
from xditd.protocol import orders
from xditd.protocol.messages import DenoiseItem

SHAPE = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64}
TEXTS = (15, 77, 256)
SIZES = ((32, 32), (33, 47), (18, 22))
TOLERANCE = 1e-5
GUIDANCE = 3.5

World = tuple[str, Ranks, Reference]


# A ring of 3 as well: with 2, the block before and the block after are the same.
# (cfg, tensor, ulysses, ring)
WORLDS = {
    "ulysses2": (1, 1, 2, 1),
    "ring2": (1, 1, 1, 2),
    "ulysses2-ring2": (1, 1, 2, 2),
    "cfg2": (2, 1, 1, 1),
    "tensor2": (1, 2, 1, 1),
}
LONG = {
    "ring3": (1, 1, 1, 3),
    "cfg2-ulysses2": (2, 1, 2, 1),
    "cfg2-tensor2": (2, 2, 1, 1),
    "tensor2-ulysses2": (1, 2, 2, 1),
    "tensor4": (1, 4, 1, 1),
}
PARAMS = [pytest.param(degrees, id=name) for name, degrees in WORLDS.items()] + [
    pytest.param(degrees, id=name, marks=pytest.mark.soak) for name, degrees in LONG.items()
]


@pytest.fixture(scope="module", params=PARAMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    cfg, tensor, ulysses, ring = request.param
    folder: Path = tmp_path_factory.mktemp("w")
    path = make_flux(folder / "flux.safetensors", **SHAPE, dtype=torch.float32)
    degrees = {"cfg": cfg, "tensor": tensor, "ulysses": ulysses, "ring": ring}
    with running(folder, path=path, **degrees, wait=False) as ranks:
        reference = Reference(path, flux_facts(**SHAPE))  # while they start
        ready = ranks.ready()
        name = " × ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
        check_weights(name, "flux", path, ready, tensor)
        yield name, ranks, reference


def conditioning(text: int, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(text)
    return {
        "context": torch.randn(batch, text, SHAPE["context_width"], generator=generator),
        "pooled": torch.randn(batch, SHAPE["pooled_width"], generator=generator),
    }


def latent(size: tuple[int, int], batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(seed))


def denoise(ranks: Ranks, x: torch.Tensor, t: tuple[float, ...], key: str = "c") -> torch.Tensor:
    (prediction,) = ranks.denoise([x], t, key=key)
    return prediction


def test_a_world_denoises_as_one_process_does(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    name, ranks, reference = world
    rows = []
    for text in TEXTS:
        given = conditioning(text)
        ranks.condition(1, "c", given, guidance=GUIDANCE)
        figures = []
        for size in SIZES:
            x = latent(size)
            expected = reference.predict(x, 0.7, **given, guidance=GUIDANCE)
            figures.append(error(denoise(ranks, x, (0.7,)), expected))
        rows.append((text, figures))
    ranks.send(orders.ForgetRun(run=1))
    with capsys.disabled():
        print(f"\n  denoise, {name}: error against one process")
        print("    text  " + "".join(f"{f'{h}×{w}':>10}" for h, w in SIZES))
        for text, figures in rows:
            print(f"    {text:4}  " + "".join(f"{figure:10.1e}" for figure in figures))
    assert max(figure for _, figures in rows for figure in figures) < TOLERANCE


def test_a_world_samples_as_one_process_does(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    name, ranks, reference = world
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    shown = []
    for text, size in zip(TEXTS, reversed(SIZES), strict=True):
        given, noise = conditioning(text), latent(size)
        ranks.condition(2, "c", given, guidance=GUIDANCE)
        (described,), frames = framed([noise])
        ranks.send(
            orders.BeginSample(
                run=2, sampler="euler", sigmas=tuple(sigmas), noise=described, latent=None, conditioning="c",
                negative=None, cfg=1.0, out=None, previews=(), preview_frames=False,
            ),
            *frames,
        )  # fmt: skip
        for step in range(4):
            done, outputs = ranks.turn(orders.TurnSample(order=10 + step, run=2, step=step))
            assert len(done.outputs) == (step == 3)
        expected = euler(
            lambda x, t, given=given: reference.predict(x, t, **given, guidance=GUIDANCE), sigmas, noise
        )
        shown.append((text, size, error(outputs[0], expected)))
    ranks.send(orders.ForgetRun(run=2))
    with capsys.disabled():
        figures = ", ".join(f"{text} with {h}×{w}: {figure:.1e}" for text, (h, w), figure in shown)
        print(f"\n  sample (euler, 4 steps), {name}: text {figures}")
    assert max(figure for _, _, figure in shown) < TOLERANCE


def test_calls_of_one_turn_are_each_computed_right(world: World) -> None:
    """Cond and uncond of a step, texts of two lengths; and a third call, which two groups do not share out evenly."""
    _, ranks, reference = world
    texts = {"positive": conditioning(31), "negative": conditioning(15), "third": conditioning(77)}
    for key, given in texts.items():
        ranks.condition(4, key, given, guidance=GUIDANCE)
    latents = [latent((18, 22), seed=seed) for seed in range(3)]
    described, frames = framed(latents)
    for count in (1, 2, 3):
        items = tuple(
            DenoiseItem(x=x, t=(0.6,), conditioning=key)
            for x, key in zip(described[:count], texts, strict=False)
        )
        _, predictions = ranks.turn(orders.TurnDenoise(order=20 + count, run=4, items=items), *frames[:count])
        for x, given, prediction in zip(latents, texts.values(), predictions, strict=False):
            assert error(prediction, reference.predict(x, 0.6, **given, guidance=GUIDANCE)) < TOLERANCE
    ranks.send(orders.ForgetRun(run=4))


def test_a_guided_sample_is_right(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    name, ranks, reference = world
    positive, negative, noise, scale = conditioning(31), conditioning(15), latent((18, 22)), 3.0
    ranks.condition(5, "p", positive, guidance=GUIDANCE)
    ranks.condition(5, "n", negative, guidance=GUIDANCE)
    (described,), frames = framed([noise])
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    ranks.send(
        orders.BeginSample(
            run=5, sampler="euler", sigmas=tuple(sigmas), noise=described, latent=None, conditioning="p",
            negative="n", cfg=scale, out=None, previews=(), preview_frames=False,
        ),
        *frames,
    )  # fmt: skip
    for step in range(4):
        _, outputs = ranks.turn(orders.TurnSample(order=30 + step, run=5, step=step))

    def guided(x: torch.Tensor, t: float) -> torch.Tensor:
        cond, uncond = (reference.predict(x, t, **given, guidance=GUIDANCE) for given in (positive, negative))
        return uncond + (cond - uncond) * scale

    figure = error(outputs[0], euler(guided, sigmas, noise))
    ranks.send(orders.ForgetRun(run=5))
    with capsys.disabled():
        print(f"\n  guided sample (euler, 4 steps, scale {scale:g}), {name}: {figure:.1e}")
    assert figure < TOLERANCE


def test_a_batch_with_its_own_times_and_texts_is_right(world: World) -> None:
    _, ranks, reference = world
    given, x, t = conditioning(31, batch=2), latent((18, 22), batch=2), (0.9, 0.2)
    ranks.condition(3, "c", given, guidance=GUIDANCE)
    (described,), frames = framed([x])
    item = DenoiseItem(x=described, t=t, conditioning="c")
    _, (prediction,) = ranks.turn(orders.TurnDenoise(order=2, run=3, items=(item,)), *frames)
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        expected = reference.predict(x[i : i + 1], t[i], **alone, guidance=GUIDANCE)
        assert error(prediction[i : i + 1], expected) < TOLERANCE
    ranks.send(orders.ForgetRun(run=3))


def test_a_refusal_leaves_the_world_in_step(world: World) -> None:
    """All ranks refuse alike, rank 0 tells, and the next turn works: nobody waits in a collective."""
    _, ranks, reference = world
    given, x = conditioning(15), latent((18, 22))
    ranks.condition(1, "c", given, guidance=GUIDANCE)
    (described,), frames = framed([x])
    item = DenoiseItem(x=described, t=(0.5,), conditioning="never put")
    ranks.send(orders.TurnDenoise(order=3, run=1, items=(item,)), *frames)
    failed, _ = ranks.wait(orders.RankFailed)
    assert (failed.rank, failed.order, failed.code, failed.alive) == (0, 3, "no_such_conditioning", True)
    assert error(denoise(ranks, x, (0.5,)), reference.predict(x, 0.5, **given, guidance=GUIDANCE)) < TOLERANCE
