"""A group's weights have one set of LoRAs: which runs share it, who waits for it, and what the ranks are told."""

from __future__ import annotations

from tests.daemon.world import World
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol import orders as o

INK, OIL = ("ink", 0.8), ("oil", 0.5)


def told(world: World, run: Run) -> list[tuple[str, ...]]:
    """The sets that ranks were told to have for a run, by their files."""
    kind = o.SetLoras
    orders = [order for _, order in world.orders if isinstance(order, kind) and order.run == run.id]
    return [tuple(merge.path for merge in order.loras) for order in orders]


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


def test_a_lora_that_cannot_be_read_any_more_ends_its_run_and_not_the_model() -> None:
    world = World()
    run = world.open_ready(loras=[INK])
    group = world.group(run)
    innocent = world.open(loras=[INK])
    asked = world.denoise(innocent)
    world.core.rank_failed(
        group,
        o.RankFailed(
            rank=1,
            order=None,
            run=run.id,
            code="model_not_visible",
            message="/ink is gone.",
            traceback="",
            alive=False,
        ),
        world.now,
    )
    assert (run.state, run.code) == ("ended", "model_not_visible")
    world.leave(group)
    world.pass_time(10.0)
    world.ready(world.started[-1])
    assert len(world.started) == 2
    world.finish_turn(world.group(innocent))
    assert isinstance(world.end_of(asked), m.Denoised)


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
