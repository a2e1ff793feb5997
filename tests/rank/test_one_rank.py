"""One rank with a Flux in bfloat16: slots and frames, previews, guidance, several items, and what it forgets."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from tests.rank.ranks import Ranks, Slots, framed, running
from xditd.models.families import load
from xditd.models.making import make_flux
from xditd.protocol import orders
from xditd.protocol.messages import DenoiseItem

SHAPE = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("o")
    path = make_flux(folder / "flux.safetensors", **SHAPE)
    with running(folder, path=path, dtype="bfloat16") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def network(ranks: Ranks):
    return load("flux", ranks.specs[0].path, "transformer", CPU, torch.bfloat16)


@pytest.fixture(scope="module")
def slots(ranks: Ranks) -> Slots:
    return ranks.slots()


def conditioning(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "context": torch.randn(1, 20 + seed, SHAPE["context_width"], generator=generator),
        "pooled": torch.randn(1, SHAPE["pooled_width"], generator=generator),
    }


def latent(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, 16, 9, 14, generator=torch.Generator().manual_seed(seed)).to(dtype)


def predict(network, x: torch.Tensor, sigma: float, seed: int, guidance: float = 3.5) -> torch.Tensor:
    with torch.no_grad():
        given = network.condition(conditioning(seed), {"guidance": guidance})
        return network.predict(x, torch.tensor([sigma]), given)


def begin(**changes: object) -> orders.BeginSample:
    given = {
        "run": 5, "sampler": "euler", "sigmas": (1.0, 0.6, 0.0), "latent": None, "conditioning": "c",
        "negative": None, "cfg": 1.0, "out": None, "previews": (), "preview_frames": False,
    }  # fmt: skip
    return orders.BeginSample(**{**given, **changes})  # type: ignore[arg-type]


def test_two_items_in_slots_and_frames_are_answered_together(ranks: Ranks, slots: Slots, network) -> None:
    """The cond and the uncond of a step: each with its conditioning, each answered where it was asked for."""
    ranks.condition(1, "c", conditioning(1), guidance=3.5)
    ranks.condition(1, "u", conditioning(2))
    a, b = latent(1), latent(2, torch.float32)
    out = slots.take(tuple(a.shape), torch.float32)
    (described,), frames = framed([b])
    items = (
        DenoiseItem(x=slots.put(a), t=(0.8,), conditioning="c", out=out),
        DenoiseItem(x=described, t=(0.8,), conditioning="u"),
    )
    done, (second,) = ranks.turn(orders.TurnDenoise(order=1, run=1, items=items), *frames)
    assert done.outputs[0] == out
    assert done.seconds > 0
    assert torch.equal(slots.view(out), predict(network, a, 0.8, 1).float())
    assert torch.equal(second, predict(network, b, 0.8, 2).float())
    ranks.send(orders.ForgetRun(run=1))


def test_a_sample_previews_x0_in_turn_and_puts_the_latent_into_its_slot(
    ranks: Ranks, slots: Slots, network
) -> None:  # fmt: skip
    ranks.condition(5, "c", conditioning(1))
    noise = latent(3, torch.float32)
    out = slots.take(tuple(noise.shape), torch.float32)
    previews = tuple(slots.take(tuple(noise.shape), torch.float32) for _ in range(2))
    ranks.send(begin(noise=slots.put(noise), out=out, previews=previews))
    x0 = noise - predict(network, noise, 1.0, 1).float()
    x = noise + (noise - x0) * (0.6 - 1.0)
    last = x - predict(network, x, 0.6, 1).float() * torch.tensor(0.6)

    first, _ = ranks.turn(orders.TurnSample(order=2, run=5, step=0))
    assert (first.outputs, first.preview) == ((), previews[0])
    assert torch.allclose(slots.view(previews[0]), x0, atol=1e-5)
    second, _ = ranks.turn(orders.TurnSample(order=3, run=5, step=1))
    assert (second.outputs, second.preview) == ((out,), previews[1])
    assert torch.allclose(slots.view(out), last, atol=0.05)  # two roundings of bfloat16 lie between
    ranks.send(orders.ForgetRun(run=5))


def test_a_sample_without_slots_sends_x0_and_the_latent_as_frames(ranks: Ranks) -> None:
    ranks.condition(5, "c", conditioning(1))
    (described,), frames = framed([latent(3, torch.float32)])
    ranks.send(begin(noise=described, preview_frames=True), *frames)
    first, _ = ranks.turn(orders.TurnSample(order=4, run=5, step=0))
    assert first.outputs == ()
    assert first.preview is not None
    assert first.preview.frame == 0
    second, (result,) = ranks.turn(orders.TurnSample(order=5, run=5, step=1))
    assert second.preview is not None
    assert second.preview.frame == 1
    assert result.shape == (1, 16, 9, 14)
    ranks.send(orders.ForgetRun(run=5))


def test_guidance_goes_from_the_negative_through_the_positive(ranks: Ranks, network) -> None:
    ranks.condition(6, "c", conditioning(1))
    ranks.condition(6, "u", conditioning(2))
    noise = latent(4, torch.float32)
    (described,), frames = framed([noise])
    ranks.send(begin(run=6, noise=described, sigmas=(1.0, 0.0), negative="u", cfg=4.0), *frames)
    _, (result,) = ranks.turn(orders.TurnSample(order=6, run=6, step=0))
    with_text, without = (noise - predict(network, noise, 1.0, seed).float() for seed in (1, 2))
    assert torch.allclose(result, without + (with_text - without) * 4.0, atol=1e-4)
    ranks.send(orders.ForgetRun(run=6))


def test_a_forgotten_run_is_gone_and_the_next_turn_works(ranks: Ranks) -> None:
    ranks.condition(7, "c", conditioning(1))
    (described,), frames = framed([latent(1)])
    item = DenoiseItem(x=described, t=(0.5,), conditioning="c")
    ranks.turn(orders.TurnDenoise(order=7, run=7, items=(item,)), *frames)
    ranks.send(orders.ForgetRun(run=7))
    for order in (
        orders.TurnDenoise(order=8, run=7, items=(item,)),
        orders.TurnSample(order=9, run=7, step=0),
    ):
        ranks.send(order, *frames)
        failed, _ = ranks.wait(orders.RankFailed)
        assert failed.order == order.order
        assert failed.alive
        assert failed.code in ("no_such_conditioning", "no_such_run")


def test_a_hundred_runs_leave_no_memory_behind(ranks: Ranks) -> None:
    """Each puts 1 MiB of conditioning and begins a sample that it never ends. The next comes when that is done: orders that pile up
    before a rank that is slow would take memory that its allocator then keeps, and that is no run's."""
    (described,), frames = framed([latent(1)])
    item = DenoiseItem(x=described, t=(0.5,), conditioning="c")

    def catch_up() -> None:
        ranks.turn(orders.TurnDenoise(order=99, run=99, items=(item,)), *frames)  # all before it is done

    def own() -> int:  # not what it shares with other forks, which counts when it is first touched
        return psutil.Process(ranks.processes[0].pid).memory_full_info().uss

    context = torch.randn(1, 4096, SHAPE["context_width"])
    ranks.condition(99, "c", conditioning(1))
    catch_up()
    before = own()
    for run in range(100, 200):
        ranks.condition(run, "c", {**conditioning(1), "context": context})
        (noise,), noises = framed([torch.randn(1, 16, 64, 64)])
        ranks.send(begin(run=run, noise=noise), *noises)
        ranks.send(orders.ForgetRun(run=run))
        catch_up()
    assert own() - before < 20 << 20
    ranks.send(orders.ForgetRun(run=99))


def test_what_an_order_that_is_no_turn_did_wrong_is_told_in_its_runs_next_turn(ranks: Ranks) -> None:
    ranks.condition(8, "c", conditioning(1))
    (described,), frames = framed([latent(3, torch.float32)])
    ranks.send(begin(run=8, noise=described, sampler="lcm"), *frames)
    ranks.send(orders.TurnSample(order=10, run=8, step=0))
    failed, _ = ranks.wait(orders.RankFailed)
    assert (failed.order, failed.code, failed.alive) == (10, "bad_value", True)
    assert "euler" in failed.message
    ranks.send(orders.ForgetRun(run=8))


def test_a_rank_does_not_know_an_order_of_another_part(ranks: Ranks) -> None:
    (described,), frames = framed([latent(1)])
    ranks.send(orders.TurnDecode(order=11, run=1, latent=described, clamp=True, out=None), *frames)
    failed, _ = ranks.wait(orders.RankFailed)
    assert (failed.order, failed.code, failed.alive) == (11, "not_built", True)


def test_told_to_leave_it_ends_with_code_0(ranks: Ranks) -> None:
    """Last here: the segments go first, as when a client ends."""
    ranks.send(orders.DropSegments(segments=(1,)))
    ranks.send(orders.Leave())
    assert ranks.codes() == [0]
