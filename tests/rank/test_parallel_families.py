"""Every family beside Flux: a world computes what plain diffusers computes in one process, whatever the sizes.

Real ranks with real xfuser over gloo. Figures are the largest difference over the standard deviation, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.rank.families import CASES, Case, Predict, normal
from tests.rank.ranks import Ranks, check_weights, framed, running
from tests.rank.reference import error, euler, slope
from xditd.catalog.families import TRANSFORMERS
from xditd.protocol import orders

TEXTS = (15, 77)
TOLERANCE = 1e-5

WORLDS = {"ulysses2": (2, 1, 1), "ring2": (1, 2, 1), "tensor2": (1, 1, 2)}
LONG = {"ulysses2-ring2": (2, 2, 1), "tensor2-ulysses2": (2, 1, 2), "tensor2-ring2": (1, 2, 2)}
QUICK = {
    "sd3.5_medium": ("ulysses2", "tensor2"),
    "pixart_alpha": ("ring2",),
    "hunyuandit_1.2": ("ulysses2",),
    "sdxl": ("one",),
}
"""What make test has: each family once, each plan once. All others are soak, and most in `tests.rank.exactness`."""

FULL = ("sd3.5_medium", "pixart_alpha", "hunyuandit_1.2")
"""Tried in more ways: those that have all that others of their family have."""

ALIKE = ("hunyuandit_1.1", "sd3.5_large")
"""What differs from another in nothing that is split; `tests.rank.exactness` tries these, too."""

PARAMS = [
    pytest.param(
        (name, world), id=f"{name}-{world}", marks=[] if world in QUICK.get(name, ()) else [pytest.mark.soak]
    )
    for name, case in CASES.items()
    for world in (WORLDS | LONG if case.parallel else ("one",))
    if name not in ALIKE
    if name in FULL or world in ("one", "ulysses2")
]

World = tuple[str, Ranks, Predict, Case]


def test_every_family_and_every_plan_of_two_is_in_make_test() -> None:
    quick = [parameter.values[0] for parameter in PARAMS if not parameter.marks]
    assert set(quick) == {(name, world) for name, worlds in QUICK.items() for world in worlds}
    assert {CASES[name].family for name, _ in quick} == {case.family for case in CASES.values()}
    assert {world for _, world in quick} >= {"one", *WORLDS}


@pytest.fixture(scope="module", params=PARAMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name, kind = request.param
    case, (ulysses, ring, tensor) = CASES[name], (WORLDS | LONG).get(kind, (1, 1, 1))
    folder = tmp_path_factory.mktemp("w")
    path = case.make(folder / "model.safetensors")
    degrees = {"ulysses": ulysses, "ring": ring, "tensor": tensor}
    with running(folder, path=path, family=case.family, **degrees, wait=False) as ranks:
        reference = case.reference(path)
        check_weights(f"{name}, {kind}", case.family, path, ranks.ready(), tensor)
        yield f"{name}, {kind}", ranks, reference, case


def denoise(ranks: Ranks, x: torch.Tensor, t: tuple[float, ...]) -> torch.Tensor:
    (prediction,) = ranks.denoise([x], t)
    return prediction


def test_a_world_denoises_as_one_process_does(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    name, ranks, reference, case = world
    figures = {}
    for text in TEXTS:
        given = case.conditioning(text)
        ranks.condition(1, "c", given)
        for size in case.sizes:
            x = normal(1, case.channels, *size)
            figures[text, size] = error(
                denoise(ranks, x, (case.t,)), reference(x, torch.tensor([case.t]), given)
            )
    ranks.send(orders.ForgetRun(run=1))
    with capsys.disabled():
        print(f"\n  {name}: " + ", ".join(f"{figure:.1e}" for figure in figures.values()), end="")
    assert max(figures.values()) < TOLERANCE


def test_a_batch_with_its_own_times_and_texts_is_right(world: World) -> None:
    _, ranks, reference, case = world
    given, x, t = (
        case.conditioning(31, batch=2),
        normal(2, case.channels, *case.sizes[-1]),
        (case.t, case.t / 3),
    )
    ranks.condition(1, "c", given)
    prediction = denoise(ranks, x, t)
    ranks.send(orders.ForgetRun(run=1))
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        expected = reference(x[i : i + 1], torch.tensor([t[i]]), alone)
        assert error(prediction[i : i + 1], expected) < TOLERANCE


def test_a_model_is_sampled_as_one_process_samples_it(world: World) -> None:
    _, ranks, reference, case = world
    sigmas, given, noise = (
        [1.0, 0.7, 0.3, 0.0] if case.predicts == "flow" else [12.0, 3.0, 0.5, 0.0],
        case.conditioning(21),
        normal(1, case.channels, *case.sizes[-1]),
    )
    ranks.condition(2, "c", given)
    (described,), frames = framed([noise])
    ranks.send(
        orders.BeginSample(
            run=2, sampler="euler", sigmas=tuple(sigmas), noise=described, latent=None, conditioning="c",
            negative=None, cfg=1.0, out=None, previews=(), preview_frames=False,
        ),
        *frames,
    )  # fmt: skip
    for step in range(3):
        _, outputs = ranks.turn(orders.TurnSample(order=10 + step, run=2, step=step))
    ranks.send(orders.ForgetRun(run=2))
    table = TRANSFORMERS[case.family].noise({"v": 0, "zsnr": 0, "sizes": 0}).sigmas()
    expected = euler(partial(slope, case.predicts, table, partial(reference, given=given)), sigmas, noise)
    assert error(outputs[0], expected) < TOLERANCE
