"""A model that nobody uses sleeps in the host's memory, and the next run wakes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.daemon.world import VAE, World
from xditd.daemon.chronicle import Chronicle
from xditd.daemon.devices import Device
from xditd.daemon.groups import Group
from xditd.daemon.requests import Requests
from xditd.daemon.residency import Keep
from xditd.daemon.sight import Sight
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError

GPU = ("cuda:0",)
TEN = Keep(awake=10.0)


def idle(**arguments) -> tuple[World, Group]:
    """A model that sleeps after ten seconds, and that no run uses any more."""
    world = World(devices=GPU, **{"keep": TEN, **arguments})
    run = world.open_ready()
    group = world.group(run)
    world.core.stop(run, "done", world.now)
    return world, group


def dozing(**arguments) -> tuple[World, Group]:
    world, group = idle(**arguments)
    world.pass_time(11.0)
    assert group.state == "dozing"
    return world, group


def asleep(**arguments) -> tuple[World, Group]:
    world, group = dozing(**arguments)
    world.rest(group, asleep=True)
    assert group.state == "asleep"
    return world, group


def told(world: World, group: Group, kind: type) -> int:
    return sum(isinstance(order, kind) for name, order in world.orders if name == group.name)


def test_who_is_not_used_for_long_enough_is_put_to_sleep_and_the_next_run_wakes_it():
    world, group = idle()
    world.pass_time(9.0)
    assert group.state == "ready"
    world.pass_time(2.0)
    assert (group.state, told(world, group, o.Sleep)) == ("dozing", 1)
    world.rest(group, asleep=True)
    world.pass_time(100.0)
    assert (group.state, told(world, group, o.Sleep)) == ("asleep", 1)
    run = world.open()
    assert (group.state, told(world, group, o.Wake)) == ("waking", 1)
    assert [event.phase for event in world.of(run.reopen)] == ["waking"]
    world.rest(group, asleep=False)
    assert run.group == group.name
    assert len(world.started) == 1
    request = world.denoise(run)
    world.finish_turn(group)
    assert isinstance(world.end_of(request), m.Denoised)


def test_who_is_in_use_does_not_sleep():
    world = World(devices=GPU, keep=TEN)
    run = world.open_ready()
    for _ in range(4):
        world.pass_time(11.0)
        world.denoise(run)
        world.finish_turn(world.group(run))
    assert world.group(run).state == "ready"


def test_without_a_time_to_sleep_nobody_does():
    world, group = idle(keep=Keep(usual=1e6))
    world.pass_time(1e5)
    assert group.state == "ready"
    one = Keep(awake_of={"vae/ae.safetensors": 1.0})
    world, group = idle(keep=one)
    world.pass_time(1e5)
    assert group.state == "ready"


def test_a_run_that_comes_while_it_dozes_off_wakes_it_when_it_sleeps():
    world, group = idle()
    world.pass_time(11.0)
    run = world.open()
    assert (run.state, group.state, told(world, group, o.Wake)) == ("queued", "dozing", 0)
    world.rest(group, asleep=True)
    assert group.state == "waking"
    world.rest(group, asleep=False)
    assert run.group == group.name


def test_a_load_wakes_it_too_and_is_answered_when_it_is_awake():
    world, group = asleep()
    request = world.load()
    assert group.state == "waking"
    world.rest(group, asleep=False)
    loaded = world.end_of(request)
    assert (loaded.group, loaded.warm) == (group.name, False)


def test_its_devices_memory_is_free_for_others_while_it_sleeps_and_it_waits_for_room_to_wake():
    world, group = asleep(memory_total=4)
    other = world.open_ready(ref=VAE)
    run = world.open()
    assert (group.state, run.state) == ("asleep", "queued")
    world.core.stop(other, "done", world.now)
    there = world.started[-1]
    assert there.state == "dozing"  # it may sleep too, so it is not ended
    world.rest(there, asleep=True)
    assert group.state == "waking"
    world.rest(group, asleep=False)
    assert run.group == group.name
    assert len(world.started) == 2


def test_what_one_that_wakes_has_yet_to_take_is_nobody_elses():
    world, group = asleep(memory_total=9, memory_others=3)  # six are free: room for one of the two
    world.open()
    assert group.state == "waking"
    world.open(ref=VAE)
    assert len(world.started) == 1, "started into memory that the waking one is about to take"


def test_one_that_leaves_asleep_has_no_memory_to_give_back():
    world, group = asleep(memory_total=4)
    other = world.open_ready(ref=VAE)
    world.core.unload([group], False, world.now)
    assert group.state == "leaving"
    assert world.core.fleet.residency.resident(world.core.fleet.groups.values(), GPU[0]) == 4
    assert other.state == "bound"


def test_one_that_was_put_to_sleep_for_another_and_is_wanted_again_comes_behind_it():
    """Found under load: it was woken before the one that it slept for could start, a thousand times in a second."""
    world = World(devices=GPU, keep=TEN, memory_total=4, patience=3.0)
    run = world.open_ready()
    group = world.group(run)
    other = world.open(ref=VAE)
    world.pass_time(4.0)
    again = world.open(peer=b"again")
    assert (other.state, again.state) == (
        "queued",
        "queued",
    )  # its place is kept free for who waits for its memory
    world.core.stop(run, "done", world.now)
    assert group.state == "dozing"
    world.rest(group, asleep=True)
    assert group.state == "asleep"
    world.ready(world.started[-1])
    assert other.state == "bound"


def test_a_run_that_comes_when_the_last_one_has_given_up_has_not_waited_for_its_time_too():
    world, _ = asleep(memory_total=4, patience=5.0)
    other = world.open_ready(ref=VAE)
    world.core.stop(world.open(), "given up", world.now)
    world.pass_time(8.0)
    run = world.open(peer=b"late")
    assert (run.state, world.core.fleet.held) == ("queued", frozenset())
    world.pass_time(4.0)
    assert world.core.fleet.held == frozenset()
    world.pass_time(2.0)
    assert world.core.fleet.held == {other.group}


def test_nor_is_one_that_sleeps_ended_at_once_for_what_another_program_holds():
    world, group = asleep(memory_total=9)
    world.memory_others = 7
    world.core.stop(world.open(), "given up", world.now)
    world.pass_time(60.0)
    run = world.open(peer=b"late")
    assert (run.state, group.state) == ("queued", "asleep")
    world.memory_others = 0
    world.pass_time(1.0)
    assert group.state == "waking"


def test_it_can_be_put_to_sleep_by_name_but_not_under_a_run():
    world, group = idle(keep=Keep())
    world.core.sleep([group], world.now)
    assert (group.state, told(world, group, o.Sleep)) == ("dozing", 1)
    world.core.sleep([group], world.now)  # on its way already
    world.rest(group, asleep=True)
    world.open()
    world.rest(group, asleep=False)
    with pytest.raises(XditError, match="group_busy"):
        world.core.sleep([group], world.now)
    world, group = idle(host_free=13)
    with pytest.raises(XditError, match="out_of_memory"):
        world.core.sleep([group], world.now)
    assert group.state == "ready"


def test_room_is_made_by_sleep_where_the_host_has_room_and_else_by_leaving():
    for host_free, state in ((20, "dozing"), (13, "leaving")):
        world, group = idle(
            memory_total=4, host_free=host_free
        )  # the weights are four bytes, ten are left to others
        world.open(ref=VAE)
        assert group.state == state


def test_nobody_goes_to_sleep_where_the_host_has_no_room():
    world, group = idle(host_free=13)
    world.pass_time(11.0)
    assert group.state == "ready"
    world.host_free = 14
    world.pass_time(0.1)
    assert group.state == "dozing"


def test_two_do_not_take_the_same_room():
    world, _ = idle(host_free=17)
    world.core.stop(world.open_ready(ref=VAE), "done", world.now)
    world.pass_time(11.0)
    assert [group.state for group in world.core.fleet.groups.values()] == ["dozing", "ready"]


def test_one_that_sleeps_is_not_kept_longer_than_one_that_is_awake():
    world, group = asleep(keep=Keep(usual=60.0, awake=10.0))
    world.pass_time(50.0)
    assert (group.state, told(world, group, o.Leave)) == ("leaving", 1)


def test_it_can_be_unloaded_and_freed_while_it_sleeps():
    world, group = asleep()
    world.core.unload([group], False, world.now)
    assert group.state == "leaving"
    for world, group in (asleep(), dozing()):
        assert world.core.fleet.free_memory(0, GPU, world.now) == [group]
        assert group.state == "leaving"


def test_a_rank_that_dies_asleep_is_not_missed_until_somebody_comes():
    world, group = asleep()
    world.die(group)
    assert list(world.core.fleet.groups) == []
    run = world.open()
    world.ready(world.started[-1])
    assert run.state == "bound"


def test_one_that_can_not_wake_is_replaced():
    world, group = asleep()
    run = world.open()
    failed = o.RankFailed(rank=0, order=None, code="out_of_memory", message="m", traceback="", alive=False)
    world.core.rank_failed(group, failed, world.now)
    world.leave(group)
    again = world.started[-1]
    assert (again.name, again.generation) == (group.name, 2)
    world.ready(again)
    assert run.group == again.name


def test_a_request_to_sleep_is_answered_when_the_model_sleeps_with_the_memory_that_came_back():
    world, group = idle(keep=Keep(), memory_total=9)
    sight = Sight(Chronicle(world.answer, lambda: world.now))
    gpu = Device("cuda:0", "GPU")
    requests = Requests(world, world.core, None, [gpu], sight=sight, stop=lambda: None)
    requests.handle(SimpleNamespace(peer=b"ctl", name="ctl"), m.Sleep(id=77, group=group.name), ())
    assert (group.state, world.of(77)) == ("dozing", [])
    world.rest(group, asleep=True)
    answer = world.end_of(77)
    assert isinstance(answer, m.Slept)
    assert answer.groups == (group.name,)
    (before,), (after,) = answer.before, answer.after
    assert (before.device, before.used, before.models) == ("cuda:0", 4, 4)
    assert (after.device, after.used, after.models) == ("cuda:0", 0, 0)


def test_a_request_to_sleep_is_refused_once_where_a_rank_dies_on_the_way():
    """It is told when the last of the ranks is gone, and not again when another group goes."""
    world, group = idle(keep=Keep())
    sight = Sight(Chronicle(world.answer, lambda: world.now))
    requests = Requests(world, world.core, None, [], sight=sight, stop=lambda: None)
    requests.handle(SimpleNamespace(peer=b"ctl", name="ctl"), m.Sleep(id=77, group=group.name), ())
    assert (group.state, world.of(77)) == ("dozing", [])
    world.core.fleet.rank_gone(group, 0, "was killed by SIGKILL", world.now)
    world.leave(group)
    other = world.open_ready(ref=VAE)
    there = world.group(other)
    world.core.unload([there], True, world.now)
    world.leave(there)
    answer = world.end_of(77)
    assert isinstance(answer, m.Failed)
    assert (answer.code, "Rank 0" in answer.message) == ("rank_lost", True)


def test_ranks_that_do_not_wake_in_time_are_killed():
    world, group = asleep()
    world.open()
    world.pass_time(101.0)
    assert group in world.killed


def test_a_client_that_goes_while_a_model_sleeps_has_its_segments_dropped():
    world, group = asleep()
    world.core.client_gone(b"comfy", (1,), world.now)
    assert told(world, group, o.DropSegments) == 1


def test_how_long_a_model_takes_to_load_is_not_learned_from_its_waking():
    world, group = asleep()
    before = world.core.placing.experience.load_seconds(group.key)
    world.open()
    world.now += 50.0
    world.rest(group, asleep=False)
    assert world.core.placing.experience.load_seconds(group.key) == before


def replicas_asleep() -> World:
    """Two replicas of a model, each on a device that has room for one model."""
    world = World(devices=("cuda:0", "cuda:1"), keep=TEN, memory_total=4)
    runs = [world.open(replicas=2) for _ in range(2)]
    for group in list(world.started):
        world.ready(group)
    for run in runs:
        world.core.stop(run, "done", world.now)
    world.pass_time(11.0)
    for group in world.started:
        world.rest(group, asleep=True)
    assert [group.state for group in world.started] == ["asleep", "asleep"]
    return world


def test_a_further_replica_that_sleeps_drives_nobody_out():
    world = replicas_asleep()
    other = world.open_ready(ref=VAE, devices=("cuda:1",))
    there = world.group(other)
    world.core.stop(other, "done", world.now)
    run = world.open(replicas=2)
    world.pass_time(1.0)
    waking, further = world.started[:2]
    assert [waking.state, further.state, there.state] == ["waking", "asleep", "ready"]
    world.rest(waking, asleep=False)
    assert (run.group, further.state, there.state) == (waking.name, "asleep", "ready")


def test_where_every_replica_sleeps_and_none_has_room_one_of_them_gets_some():
    world = replicas_asleep()
    for device in world.devices:
        world.core.stop(world.open_ready(ref=VAE, devices=(device,)), "done", world.now)
    first, second = world.started[-2:]
    world.open(replicas=2)
    assert [first.state, second.state] == ["dozing", "ready"]


def test_a_load_of_all_replicas_has_every_one_of_them_wake():
    world = replicas_asleep()
    other = world.open_ready(ref=VAE, devices=("cuda:1",))
    there = world.group(other)
    world.core.stop(other, "done", world.now)
    world.load(replicas=2)
    assert there.state == "dozing"


def test_a_sleeping_replica_is_not_taken_for_one_that_may_be_forgotten():
    """A further replica starts only where that drives nobody out; asleep, it has processes."""
    world = replicas_asleep()
    blocks = world.open_ready(ref=VAE, devices=("cuda:1",))
    world.open(replicas=2)
    world.open(peer=b"another", replicas=2)
    assert {group.state for group in world.core.fleet.groups.values()} == {"waking", "ready", "asleep"}
    assert blocks.state == "bound"


def test_a_model_too_large_for_what_another_program_left_is_told_to_who_waits():
    world, group = asleep(memory_total=4)
    world.memory_others = 4
    run = world.open()
    world.pass_time(6.0)
    world.leave(group)
    world.pass_time(6.0)
    assert isinstance(world.end_of(run.reopen), m.Failed)
    assert world.core.runs == {}
