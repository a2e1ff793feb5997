"""The life of runs: they are queued, bound, given turns, taken back when their group dies, and ended once."""

from __future__ import annotations

import pytest

from tests.daemon.world import DEADLINES, REF, VAE, World
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError


def test_a_run_waits_for_its_group_and_is_then_opened():
    world = World()
    run = world.open()
    assert run.state == "queued"
    assert [event.phase for event in world.of(run.reopen)] == ["starting"]
    world.ready(world.started[0])
    opened = world.end_of(run.reopen)
    assert isinstance(opened, m.RunOpened)
    assert (opened.run, opened.group) == (run.id, "g1")


def test_two_runs_of_one_model_share_its_group():
    world = World()
    first, second = world.open_ready(), world.open_ready()
    assert first.group == second.group
    assert len(world.started) == 1


def test_runs_on_one_group_take_turns_of_one_step():
    world = World()
    a, b = world.open_ready(), world.open_ready()
    group = world.group(a)
    world.sample(a, steps=3)
    world.sample(b, steps=3)
    for _ in range(6):
        world.finish_turn(group)
    assert world.turns() == [a.id, b.id, a.id, b.id, a.id, b.id]


def test_a_group_has_one_turn_under_way_and_no_more():
    world = World()
    a, b = world.open_ready(), world.open_ready()
    world.denoise(a)
    world.denoise(b)
    assert world.turns() == [a.id]
    world.finish_turn(world.group(a))
    assert world.turns() == [a.id, b.id]


def test_groups_on_the_same_device_take_turns():
    world = World()
    run = world.open_ready()
    vae = world.open_ready(ref=VAE, devices=("cpu:0",))
    world.denoise(run)
    world.denoise(vae)
    assert world.turns() == [run.id]
    world.finish_turn(world.group(run))
    assert world.turns() == [run.id, vae.id]


def test_groups_on_other_devices_work_at_the_same_time():
    world = World()
    a = world.open_ready(devices=("cpu:0",))
    b = world.open_ready(devices=("cpu:1",))
    world.denoise(a)
    world.denoise(b)
    assert world.turns() == [a.id, b.id]


def test_a_run_that_needs_all_devices_is_not_starved_by_runs_that_need_one():
    world = World()
    small = world.open_ready(devices=("cpu:0",))
    large = world.open_ready(devices=("cpu:0", "cpu:1"))
    other = world.open_ready(devices=("cpu:1",))
    world.sample(small, steps=9)
    world.denoise(large)  # waits for cpu:0
    world.denoise(other)  # cpu:1 is free, but spoken for
    assert world.turns() == [small.id]
    world.finish_turn(world.group(small))
    assert world.turns() == [small.id, large.id]


def test_a_sample_begins_once_reports_each_step_and_is_answered_once():
    world = World()
    run = world.open_ready()
    request = world.sample(run, steps=3)
    for _ in range(3):
        world.finish_turn(world.group(run))
    events = [e for e in world.of(request) if isinstance(e, m.Progress)]
    assert [(e.step, e.total) for e in events] == [(1, 3), (2, 3), (3, 3)]
    assert events[-1].sigma == 0.0
    assert isinstance(world.end_of(request), m.Sampled)
    assert sum(isinstance(order, o.BeginSample) for _, order in world.orders) == 1
    assert run.state == "bound"


def test_asking_two_things_at_once_is_refused():
    world = World()
    run = world.open_ready()
    world.denoise(run)
    with pytest.raises(XditError, match="run_busy"):
        world.denoise(run)


def test_a_cancelled_run_in_its_turn_ends_with_that_turn():
    world = World()
    run = world.open_ready()
    request = world.sample(run, steps=5)
    world.core.stop(run, "cancelled", world.now)
    assert world.ended == []  # rank 0 may still write to its slots
    world.finish_turn(world.group(run) if run.group else world.started[0])
    assert world.ended == [run.id]
    assert world.end_of(request).code == "run_cancelled"
    assert world.turns() == [run.id]
    assert isinstance(world.orders[-1][1], o.ForgetRun)


def test_a_cancelled_run_that_waits_ends_at_once_and_others_go_on():
    world = World()
    a, b = world.open_ready(), world.open_ready()
    world.denoise(a)
    waiting = world.denoise(b)
    world.core.stop(b, "cancelled", world.now)
    assert world.end_of(waiting).code == "run_cancelled"
    world.finish_turn(world.group(a))
    assert world.turns() == [a.id]


def test_a_run_cancelled_before_its_group_is_ready_is_answered():
    world = World()
    run = world.open()
    world.core.stop(run, "cancelled", world.now)
    assert world.end_of(run.reopen).code == "run_cancelled"
    world.ready(world.started[0])  # nobody is bound to it
    assert world.end_of(run.reopen).code == "run_cancelled"


def test_when_a_rank_is_killed_the_run_goes_on_in_the_next_generation():
    world = World()
    run = world.open_ready()
    put = m.PutConditioning(id=world.request(), run=run.id, key="c", tensors={})
    world.core.put(run, put, (), world.now)
    request = world.denoise(run)
    first = world.group(run)
    world.die(first)
    assert world.killed == [first]
    second = world.started[-1]
    assert (second.name, second.generation) == (first.name, 2)
    world.orders.clear()
    world.ready(second)
    kinds = [type(order) for _, order in world.orders]
    assert kinds == [o.SetConditioning, o.TurnDenoise]  # what it knew, then what it was asked
    world.finish_turn(second)
    assert isinstance(world.end_of(request), m.Denoised)
    assert any(isinstance(e, m.Rebound) for e in world.of(request))


def test_a_sample_whose_group_died_begins_anew_from_its_noise():
    world = World()
    run = world.open_ready()
    request = world.sample(run, steps=3)
    world.finish_turn(world.group(run))
    world.die(world.group(run))
    world.ready(world.started[-1])
    for _ in range(3):
        world.finish_turn(world.group(run))
    steps = [e.step for e in world.of(request) if isinstance(e, m.Progress)]
    assert steps == [1, 1, 2, 3]
    assert sum(isinstance(order, o.BeginSample) for _, order in world.orders) == 2
    assert isinstance(world.end_of(request), m.Sampled)


def test_a_run_that_gets_on_is_rebound_as_often_as_it_takes():
    world = World(restart_limit=10)
    run = world.open_ready()
    for _ in range(5):
        request = world.denoise(run)
        world.die(world.group(run))
        world.pass_time(1.0)
        world.ready(world.started[-1])
        world.finish_turn(world.group(run))
        assert isinstance(world.end_of(request), m.Denoised)
    assert run.rebinds == 5


def test_a_request_is_asked_three_times_and_then_its_run_fails():
    world = World(restart_limit=10)
    run = world.open_ready()
    request = world.denoise(run)
    for _ in range(3):
        world.die(world.group(run))
        if not run.over:
            world.pass_time(1.0)
            world.ready(world.started[-1])
    assert world.end_of(request).code == "rank_lost"


def test_what_raised_in_a_rank_is_refused_and_not_asked_again():
    world = World()
    run = world.open_ready()
    request = world.denoise(run)
    group = world.group(run)
    report = o.RankFailed(
        rank=1, order=group.turn, code="rank_failed", message="boom", traceback="", alive=False
    )
    world.core.rank_failed(group, report, world.now)
    assert world.end_of(request).code == "rank_failed"
    world.leave(group)
    world.ready(world.started[-1])
    again = world.denoise(run)  # the run itself goes on
    world.finish_turn(world.group(run))
    assert isinstance(world.end_of(again), m.Denoised)


def test_a_rank_that_raised_and_serves_on_keeps_its_group():
    world = World(devices=("cpu:0",))
    run = world.open_ready()
    request = world.denoise(run)
    group = world.group(run)
    report = o.RankFailed(
        rank=0, order=group.turn, code="out_of_memory", message="full", traceback="", alive=True
    )
    world.core.rank_failed(group, report, world.now)
    assert world.end_of(request).code == "out_of_memory"
    assert world.killed == []
    world.denoise(run)
    assert world.turns() == [run.id, run.id]


def test_a_hanging_turn_kills_the_group_at_its_deadline():
    world = World()
    run = world.open_ready()
    world.denoise(run)
    group = world.group(run)
    world.pass_time(DEADLINES.first_turn - 1)
    assert world.killed == []
    world.pass_time(2)
    assert world.killed == [group]
    assert group.code == "deadline_exceeded"
    assert "50 s (deadlines.first_turn)" in group.problem


def test_later_turns_have_the_shorter_deadline():
    world = World()
    run = world.open_ready()
    world.denoise(run)
    world.finish_turn(world.group(run))
    world.denoise(run)
    world.pass_time(DEADLINES.turn + 1)
    (group,) = world.killed
    assert "10 s (deadlines.turn)" in group.problem


def test_a_load_that_raises_is_given_up_at_once_with_its_reason():
    world = World()
    run = world.open()
    group = world.started[0]
    report = o.RankFailed(
        rank=0, order=None, code="file_invalid", message="no key", traceback="", alive=False
    )
    world.core.rank_failed(group, report, world.now)
    failed = world.end_of(run.reopen)
    assert failed.code == "file_invalid"
    assert "no key" in failed.message


def test_a_load_that_crashes_is_tried_again_until_the_limit():
    world = World(restart_limit=3)
    run = world.open()
    for _ in range(3):
        world.die(world.started[-1])
        world.pass_time(1.0)
    assert len(world.started) == 3
    assert world.end_of(run.reopen).code == "model_failed"
    with pytest.raises(XditError, match="model_failed"):
        world.open()


def waiting_for_the_third_generation() -> tuple[World, Run]:
    """A world whose group died twice, and whose next generation starts in 8 seconds."""
    world = World(restart_limit=10, restart_backoff=8.0)
    run = world.open()
    world.die(world.started[-1])
    world.die(world.started[-1])
    assert len(world.started) == 2
    return world, run


def test_a_group_that_died_twice_starts_again_after_a_while():
    world, run = waiting_for_the_third_generation()
    world.pass_time(7.0)
    assert len(world.started) == 2
    world.pass_time(2.0)
    assert [group.generation for group in world.started] == [1, 2, 3]
    world.ready(world.started[-1])
    assert isinstance(world.end_of(run.reopen), m.RunOpened)


def test_a_group_that_nobody_wants_any_more_does_not_start_again():
    world, run = waiting_for_the_third_generation()
    world.core.stop(run, "cancelled", world.now)
    world.pass_time(9.0)
    assert len(world.started) == 2
    assert world.core.fleet.groups == {}


def test_a_load_that_waits_is_reason_enough_to_start_again():
    world, run = waiting_for_the_third_generation()
    world.core.stop(run, "cancelled", world.now)
    fleet = world.core.fleet
    fleet.load(b"ctl", m.Load(id=99, model=REF), run.found, run.keys, world.now)
    world.pass_time(9.0)
    world.ready(world.started[2])
    assert isinstance(world.end_of(99), m.Loaded)


def test_a_daemon_that_stops_starts_no_group_again_and_says_so():
    world, run = waiting_for_the_third_generation()
    world.core.fleet.load(b"ctl", m.Load(id=99, model=REF), run.found, run.keys, world.now)
    world.core.close(world.now)
    assert world.end_of(99).code == "stopping"
    world.pass_time(9.0)
    assert len(world.started) == 2
    assert world.core.fleet.groups == {}
    assert world.end_of(run.reopen).code == "run_cancelled"


def test_an_explicit_load_forgives():
    world = World(restart_limit=1)
    run = world.open()
    world.die(world.started[-1])
    world.core.fleet.load(b"ctl", m.Load(id=99, model=REF), run.found, run.keys, world.now)
    assert len(world.started) == 2
    world.ready(world.started[-1])
    assert isinstance(world.end_of(99), m.Loaded)


def test_a_load_of_what_is_ready_is_answered_at_once():
    world = World()
    run = world.open_ready()
    world.core.fleet.load(b"ctl", m.Load(id=99, model=REF), run.found, run.keys, world.now)
    assert world.end_of(99).warm


def test_a_client_that_is_gone_leaves_nothing_behind():
    world = World()
    mine, other = world.open_ready(), world.open_ready(peer=b"other")
    world.sample(mine)
    world.core.client_gone(b"comfy", (7,), world.now)
    world.finish_turn(world.group(other))
    assert world.ended == [mine.id]
    assert list(world.core.runs) == [other.id]
    assert o.DropSegments(segments=(7,)) in [order for _, order in world.orders]
    assert world.core.turns.busy == set()


def test_unloading_a_busy_group_is_refused_and_by_force_ends_its_runs_with_their_turn():
    world = World()
    run = world.open_ready()
    request = world.denoise(run)
    group = world.group(run)
    with pytest.raises(XditError, match="group_busy"):
        world.core.unload([group], False, world.now)
    world.core.unload([group], True, world.now)
    world.finish_turn(group)
    assert world.end_of(request).code == "run_cancelled"
    world.leave(group)
    assert world.core.fleet.groups == {}


def test_a_group_that_does_not_leave_is_killed():
    world = World()
    group = world.group(world.open_ready())
    world.core.close(world.now)
    assert group.state == "leaving"
    world.pass_time(DEADLINES.leave + 1)
    assert world.killed == [group]


def test_a_late_report_of_a_dead_turn_changes_nothing():
    world = World()
    run = world.open_ready()
    request = world.denoise(run)
    group = world.group(run)
    late = o.TurnDone(order=group.turn, outputs=(), seconds=0.0)
    world.finish_turn(group)
    world.core.turn_done(group, late, (), world.now)
    assert isinstance(world.end_of(request), m.Denoised)


def test_a_run_that_is_asked_nothing_ends_and_its_client_is_told():
    world = World()
    run = world.open_ready()
    world.pass_time(DEADLINES.run_idle + 1)
    ((_, told),) = [(p, r) for p, r in world.answers if isinstance(r, m.RunEnded)]
    assert (told.run, told.code) == (run.id, "run_idle")


def test_a_run_waiting_long_for_its_turn_is_not_idle():
    world = World()
    a, b = world.open_ready(), world.open_ready()
    world.sample(a, steps=2)
    waiting = world.denoise(b)
    world.now += DEADLINES.run_idle + 1
    world.finish_turn(world.group(a))
    world.core.tick(world.now)
    world.finish_turn(world.group(b))
    assert isinstance(world.end_of(waiting), m.Denoised)


def test_nothing_new_while_draining():
    world = World()
    world.core.draining = True
    with pytest.raises(XditError, match="draining"):
        world.open()


def test_a_group_that_dies_while_it_leaves_frees_its_devices_and_ends_its_run():
    world = World()
    run = world.open_ready()
    request = world.denoise(run)
    group = world.group(run)
    world.core.unload([group], True, world.now)
    world.die(group)
    assert world.end_of(request).code == "run_cancelled"
    assert world.core.turns.busy == set()
    assert world.core.runs == {}
