"""One model on several groups: loaded together, chosen among, and there for each other."""

from __future__ import annotations

import pytest

from tests.daemon.world import REF, VAE, World
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError

FOUR = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")


def ready_world(replicas: int = 4, **arguments) -> World:
    world = World(devices=FOUR, **arguments)
    world.load(replicas=replicas)
    for group in list(world.started):
        world.ready(group)
    return world


def raises_at_load(world: World, group) -> None:
    report = o.RankFailed(
        rank=0, order=None, code="file_invalid", message="no key", traceback="", alive=False
    )
    world.core.rank_failed(group, report, world.now)
    world.leave(group)


def test_a_load_is_answered_when_all_replicas_are_ready():
    world = World(devices=FOUR)
    request = world.load(replicas=2)
    assert [group.devices for group in world.started] == [FOUR[:2], FOUR[2:]]
    world.ready(world.started[0])
    assert not any(isinstance(answer, m.Loaded) for answer in world.of(request))
    world.ready(world.started[1])
    loaded = world.end_of(request)
    assert (loaded.group, loaded.groups, loaded.warnings) == ("g1", ("g1", "g2"), ())
    assert world.end_of(world.load(replicas=2)).warm


def test_a_replica_that_cannot_be_loaded_is_said_and_the_rest_serves():
    world = World(devices=FOUR)
    request = world.load(replicas=4)
    raises_at_load(world, world.started[2])
    for group in (world.started[i] for i in (0, 1, 3)):
        world.ready(group)
    loaded = world.end_of(request)
    assert loaded.groups == ("g1", "g2", "g4")
    (warning,) = loaded.warnings
    assert "cpu:2" in warning
    assert "no key" in warning
    run = world.open(replicas=4)
    assert run.state == "bound"


def test_a_load_of_which_no_replica_comes_fails_once():
    world = World(devices=FOUR)
    request = world.load(replicas=2)
    for group in list(world.started):
        raises_at_load(world, group)
    assert world.end_of(request).code == "file_invalid"


def test_a_run_waits_for_the_first_replica_and_not_for_the_last():
    world = World(devices=FOUR)
    run = world.open(replicas=4)
    world.ready(world.started[3])
    assert run.group == "g4"


def test_a_run_whose_replicas_all_fail_to_load_is_told_once():
    world = World(devices=FOUR)
    run = world.open(replicas=2)
    raises_at_load(world, world.started[0])
    assert run.state == "queued"
    raises_at_load(world, world.started[1])
    assert world.end_of(run.reopen).code == "file_invalid"


def test_round_robin_goes_round():
    world = ready_world()
    assert [world.open(replicas=4).group for _ in range(5)] == ["g1", "g2", "g3", "g4", "g1"]


def test_least_loaded_counts_runs_that_share_the_devices():
    world = ready_world(2)
    other = world.open(ref=m.ModelRef(kind="vae", name="ae"), devices=("cpu:0",))
    world.ready(world.started[-1])
    assert other.state == "bound"
    assert world.open(replicas=2, scheduling="least_loaded").group == "g2"


def test_weights_of_the_configuration_deal_runs_out():
    world = ready_world(2, weights={"cpu:0": 3.0, "cpu:1": 3.0, "cpu:2": 1.0, "cpu:3": 1.0})
    groups = [world.open(replicas=2, scheduling="weighted_round_robin").group for _ in range(8)]
    assert groups.count("g1") == 6


def test_adaptive_learns_which_replica_is_slow():
    world = ready_world(2)
    for _ in range(4):  # the first turn of a group is not learned from
        for scheduling in ("round_robin", "round_robin"):
            run = world.open(replicas=2, scheduling=scheduling)
            world.turn_seconds = 3.0 if run.group == "g1" else 1.0
            world.denoise(run)
            world.finish_turn(world.group(run))
            world.core.stop(run, "done", world.now)
    groups = [world.open(replicas=2, scheduling="adaptive").group for _ in range(4)]
    assert groups == ["g2", "g2", "g1", "g2"] or groups.count("g2") == 3


def test_a_run_whose_replica_dies_goes_on_in_another_at_once():
    world = ready_world(2)
    run = world.open(replicas=2)
    put = m.PutConditioning(id=world.request(), run=run.id, key="c", tensors={})
    world.core.put(run, put, (), world.now)
    request = world.denoise(run)
    dead = world.group(run)
    world.orders.clear()
    world.core.fleet.rank_gone(dead, 0, "was killed by SIGKILL", world.now)
    assert run.group == "g2"  # before the dead one's last rank is gone
    assert [(name, type(order)) for name, order in world.orders] == [
        ("g2", o.SetConditioning),
        ("g2", o.TurnDenoise),
    ]
    world.finish_turn(world.group(run))
    assert isinstance(world.end_of(request), m.Denoised)
    (rebound,) = [event for event in world.of(request) if isinstance(event, m.Rebound)]
    assert rebound.group == "g2"


def test_a_replica_that_died_comes_again_while_runs_count_on_the_set():
    world = ready_world(2)
    world.open(replicas=2)
    world.die(world.started[0])
    assert [(g.name, g.generation) for g in world.started] == [("g1", 1), ("g2", 1), ("g1", 2)]


def test_a_replica_that_nobody_counts_on_does_not_come_again_by_itself():
    world = ready_world(2)
    world.die(world.started[0])
    assert list(world.core.fleet.groups) == ["g2"]
    run = world.open(replicas=2)  # it is served, and the other one is started for the next
    assert run.group == "g2"
    assert world.started[-1].devices == FOUR[:2]


def test_unloading_one_replica_by_force_spares_the_runs_that_can_go_elsewhere():
    world = ready_world(2, places=1)
    here, there = world.open(replicas=2), world.open(replicas=2)
    waits = world.open(replicas=2)
    first = world.group(here)
    with pytest.raises(XditError, match="group_busy"):
        world.core.unload([first], False, world.now)
    world.core.unload([first], True, world.now)
    assert world.end_of(here.reopen)
    assert [run.id for run in world.core.runs.values()] == [there.id, waits.id]
    world.core.stop(there, "done", world.now)
    assert waits.group == "g2"


def test_the_same_model_under_another_plan_is_another_group():
    world = ready_world(2)
    assert world.open().state == "queued"
    assert world.started[-1].devices == FOUR
    assert world.started[-1].ref == REF


def test_a_further_replica_is_not_given_up_when_it_has_become_the_only_hope():
    """It stood in line behind another model; meanwhile the replica that was sure to come has failed."""
    world = World(memory_total=4)
    other = world.open_ready(ref=VAE, devices=("cpu:0",))
    run = world.open(replicas=2)
    first, further = (group for group in world.core.fleet.groups.values() if group.key in run.keys)
    assert further.spare
    world.core.fleet.fail(first, "out_of_memory", "Another program holds the rest", world.now)
    assert run.state == "queued"
    world.core.stop(other, "done", world.now)
    world.leave(world.started[0])
    assert world.started[-1] is further
    world.ready(further)
    assert run.group == further.name
