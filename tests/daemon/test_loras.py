"""A group's weights have one set of LoRAs: which runs share it, who waits for it, and what the ranks are told."""

from __future__ import annotations

import pytest

from tests.daemon.world import World
from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol import orders as o

INK, OIL = ("ink", 0.8), ("oil", 0.5)


def told(world: World, run: Run) -> list[tuple[str, ...]]:
    """The sets that ranks were told to have for a run, by their files."""
    kind = o.SetLoras
    orders = [order for _, order in world.orders if isinstance(order, kind) and order.run == run.id]
    return [tuple(merge.path for merge in order.loras) for order in orders]


def fails_of(world: World, group: Group, run: Run, code: str, rank: int = 1) -> None:
    """A rank fails of an order of the run's own, outside of turns."""
    report = o.RankFailed(
        rank=rank, order=None, run=run.id, code=code, message="It is.", traceback="", alive=False
    )
    world.core.rank_failed(group, report, world.now)


def test_a_run_opens_with_what_its_loras_change() -> None:
    world = World()
    run = world.open_ready(loras=[INK, OIL])
    assert told(world, run) == [("/ink", "/oil")]
    opened = world.end_of(run.reopen)
    assert isinstance(opened, m.RunOpened)
    assert [(match.name, match.strength, match.matched) for match in opened.lora] == [
        ("ink", 0.8, 1),
        ("oil", 0.5, 1),
    ]


def test_a_strength_of_nothing_is_no_lora() -> None:
    world = World()
    plain = world.open_ready()
    run = world.open(loras=[("ink", 0.0)])
    assert run.state == "bound"
    assert told(world, plain) == told(world, run) == []
    assert world.end_of(run.reopen).lora[0].strength == 0.0


def test_runs_with_the_same_set_share_a_group_and_others_wait_until_it_is_empty() -> None:
    world = World()
    first = world.open_ready(loras=[INK])
    same, other, plain = world.open(loras=[INK]), world.open(loras=[("ink", 0.7)]), world.open()
    assert [run.state for run in (same, other, plain)] == ["bound", "queued", "queued"]
    world.core.stop(first, "done", world.now)
    assert other.state == "queued"
    world.core.stop(same, "done", world.now)
    assert [run.state for run in (other, plain)] == ["bound", "queued"]
    world.core.stop(other, "done", world.now)
    assert plain.state == "bound"
    assert told(world, plain) == [()]  # the weights as they are in the file again


@pytest.mark.parametrize("code", ["model_not_visible", "out_of_memory"])
def test_what_fails_of_one_runs_own_order_ends_that_run_and_not_the_model(code: str) -> None:
    """A LoRA is gone, a conditioning is too large: in a world of ranks the group dies of it, however often it comes."""
    world = World(restart_limit=3)
    innocent = world.open_ready(loras=[INK])
    asked = world.denoise(innocent)
    for number in range(1, 5):
        run = world.open(loras=[INK])
        group = world.group(run)
        fails_of(world, group, run, code)
        assert (run.state, run.code, group.code) == ("ended", code, "rank_lost")
        fails_of(world, group, run, code, rank=0)  # the other rank has found the same
        world.leave(group)
        world.pass_time(10.0)
        assert len(world.started) == 1 + number, "it is not waited for: the model has failed at nothing"
        world.ready(world.started[-1])
    assert (innocent.state, innocent.rebinds) == ("working", 4)
    world.finish_turn(world.group(innocent))
    assert isinstance(world.end_of(asked), m.Denoised)


def test_a_run_whose_own_order_was_too_large_goes_on_with_less_where_there_is_less() -> None:
    world = World()
    run, innocent = world.open_ready(loras=[INK]), world.open(loras=[INK])
    two = run.key.plan
    run.ladder = Ladder.of((two,), (m.Plan(devices=two.devices[:1], reason="one device"),))
    asked, group = world.denoise(run), world.group(run)
    fails_of(world, group, run, "out_of_memory", rank=0)
    assert (run.state, innocent.state) == ("queued", "queued")
    assert run.key.plan.devices == ("cpu:1",), "not the device on which it failed"
    world.leave(group)
    for starting in world.started[1:]:
        world.ready(starting)
    world.finish_turn(world.group(run))
    assert isinstance(world.end_of(asked), m.Denoised)
    assert innocent.state == "bound"


def test_a_run_that_was_cancelled_is_not_lowered_but_ended() -> None:
    world = World()
    run = world.open_ready(loras=[INK])
    two = run.key.plan
    run.ladder = Ladder.of((two,), (m.Plan(devices=two.devices[:1], reason="one device"),))
    asked = world.denoise(run)
    world.core.stop(run, "cancelled", world.now)
    assert run.state == "working"  # until its turn is over
    fails_of(world, world.group(run), run, "out_of_memory")
    assert (run.state, run.code) == ("ended", "run_cancelled")
    assert isinstance(world.end_of(asked), m.Failed)


def test_nobody_passes_a_run_that_waits_for_the_group_to_be_empty() -> None:
    world = World()
    first = world.open_ready(loras=[INK])
    waits = world.open(loras=[OIL])
    late = world.open(loras=[INK])
    assert late.state == "queued"
    world.core.stop(first, "done", world.now)
    assert [waits.state, late.state] == ["bound", "queued"]


def test_of_several_replicas_the_one_that_has_the_set_takes_the_run() -> None:
    world = World(devices=("cpu:0", "cpu:1", "cpu:2"))
    world.load(replicas=3)
    for group in list(world.started):
        world.ready(group)
    run = world.open(replicas=3, loras=[INK])
    holder = run.group
    world.core.stop(run, "done", world.now)
    for _ in range(3):
        again = world.open(replicas=3, loras=[INK])
        assert again.group == holder
        world.core.stop(again, "done", world.now)
    assert world.open(replicas=3).group != holder  # whose weights are as in the file elsewhere


def test_a_run_waits_for_one_group_and_leaves_the_others_to_those_that_fit() -> None:
    world = World(devices=("cpu:0", "cpu:1"))
    world.load(replicas=2)
    for group in list(world.started):
        world.ready(group)
    plain = [world.open(replicas=2) for _ in range(3)]  # two on one group, one on the other
    waits = world.open(replicas=2, loras=[INK])
    late = world.open(replicas=2)
    assert (waits.state, late.state) == ("queued", "bound")
    (spared,) = {run.group for run in plain} - {late.group}
    for run in plain:
        if run.group == spared:
            world.core.stop(run, "done", world.now)
    assert waits.group == spared


def test_the_next_generation_is_told_anew() -> None:
    world = World()
    run = world.open_ready(loras=[INK])
    world.die(world.group(run))
    world.ready(world.started[-1])
    assert told(world, run) == [("/ink",), ("/ink",)]
