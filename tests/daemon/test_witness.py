"""What the core tells of runs and groups, to whoever looks on: each thing when it happens, and once."""

from __future__ import annotations

import pytest

from tests.daemon.world import REF, World
from xditd.daemon.fallback import Ladder
from xditd.daemon.residency import Keep
from xditd.protocol import messages as m
from xditd.protocol import orders as o


def test_a_run_and_its_group_are_told_of_from_the_first_to_the_last():
    world = World()
    run = world.open_ready()
    group = world.group(run)
    world.sample(run, steps=2)
    world.finish_turn(group)
    world.finish_turn(group)
    world.core.stop(run, "closed", world.now)
    world.core.unload([group], False, world.now)
    world.leave(group)
    assert world.told == [
        ("run_opened", run.id),
        ("starting", "g1"),
        ("ready", "g1"),
        ("turn_done", run.id),
        ("turn_done", run.id),
        ("run_ended", run.id),
        ("leaving", "g1"),
        ("gone", "g1"),
    ]


def test_a_group_that_sleeps_is_told_of_on_its_way_there_and_back():
    world = World(devices=("cuda:0",), keep=Keep(awake=10.0))
    run = world.open_ready()
    group = world.group(run)
    world.core.stop(run, "closed", world.now)
    world.told.clear()
    world.pass_time(11.0)
    world.rest(group, asleep=True)
    again = world.open()
    world.rest(group, asleep=False)
    assert world.told == [
        ("dozing", "g1"),
        ("asleep", "g1"),
        ("run_opened", again.id),
        ("waking", "g1"),
        ("ready", "g1"),
    ]


def test_a_group_that_dies_is_told_of_before_the_one_that_takes_its_place():
    world = World()
    run = world.open_ready()
    world.told.clear()
    world.die(world.group(run))
    world.ready(world.started[-1])
    assert world.told == [("failed", "g1"), ("gone", "g1"), ("starting", "g1"), ("ready", "g1")]


def test_a_group_is_gone_before_the_runs_that_it_takes_along():
    world = World()
    run = world.open_ready()
    group = world.group(run)
    world.denoise(run)
    world.core.unload([group], True, world.now)
    world.told.clear()
    world.die(group)
    assert world.told == [("gone", "g1"), ("run_ended", run.id)]


def test_a_group_that_only_waited_for_room_is_not_told_of():
    world = World(memory_total=9, memory_others=9)
    run = world.open()
    assert [group.state for group in world.core.fleet.groups.values()] == ["waiting"]
    world.core.stop(run, "closed", world.now)
    assert world.core.fleet.groups == {}
    assert world.told == [("run_opened", run.id), ("run_ended", run.id)]


@pytest.mark.parametrize("degraded", ["", "tiled"])
def test_a_turn_that_was_done_in_a_lesser_way_is_told_of(degraded: str):
    world = World()
    run = world.open_ready()
    group = world.group(run)
    world.denoise(run)
    world.told.clear()
    done = o.TurnDone(order=group.turn or 0, outputs=(), seconds=0.1, degraded=degraded)
    world.core.turn_done(group, done, (), world.now)
    lesser = [("degraded", run.id)] if degraded else []
    assert world.told == [("turn_done", run.id), *lesser]


def test_who_asked_for_the_end_of_a_run_is_answered_after_all_that_is_told_of_it():
    world = World()
    run = world.open_ready()
    request = world.denoise(run)
    run.due.append((b"ctl", m.Cancelled(re=77, run=run.id)))
    world.core.stop(run, "cancelled", world.now)
    assert world.of(77) == []  # it ends with its turn
    world.finish_turn(world.group(run))
    assert world.end_of(request).code == "run_cancelled"
    assert [reply.re for _, reply in world.answers[-2:]] == [request, 77]
    assert world.told[-1] == ("run_ended", run.id)


def test_a_drain_is_over_once_with_the_last_run():
    world = World()
    first, second = world.open_ready(), world.open_ready()
    over: list[list[int]] = []
    world.core.drain(lambda: over.append(world.ended))
    world.core.stop(first, "closed", world.now)
    assert over == []
    world.core.stop(second, "closed", world.now)
    assert over == [[first.id, second.id]]
    world.core.drain(lambda: over.append([]))  # nobody is left to wait for
    assert over == [[first.id, second.id], []]


def test_a_load_that_goes_on_with_less_is_told_of_and_what_it_gets_instead_starts_at_once():
    world = World(memory_total=9, memory_others=4)
    found, keys = world.what(REF)  # on two devices, which take more than is left
    one = m.Plan(devices=("cpu:0",))
    ladder = Ladder.of(tuple(key.plan for key in keys), (one,))
    world.core.fleet.load(b"ctl", m.Load(id=77, model=REF), found, keys, world.now, (), ladder)
    assert world.told == []
    world.pass_time(6.0)  # the rest stays another program's
    assert world.told == [("degraded", REF.name), ("starting", "g2")]
    assert [group.key.plan for group in world.started] == [one]
