"""Models come on demand, stay for a while, and make room for each other; none goes that a run uses."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from msgspec import structs

from tests.daemon.world import REF, VAE, World
from xditd.daemon.devices import Device, Memories
from xditd.daemon.ports import Memory
from xditd.daemon.residency import Keep, Residency
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol.errors import XditError

A, B, C = (m.ModelRef(kind="diffusion_models", name=name) for name in "abc")
SIZES = {"a": 10, "b": 10, "c": 10, "large": 30, "huge": 60}
ONE = ("cpu:0",)


def world_for_two(**arguments) -> World:
    """Its memory holds two of the models a, b and c on one device; a parameter is four bytes."""
    return World(devices=ONE, memory_total=100, parameters=SIZES, **arguments)


def groups(world: World) -> dict[str, str]:
    """Models by name, and the state of their groups."""
    return {group.ref.name: group.state for group in world.core.fleet.groups.values()}


def used(world: World, ref: m.ModelRef, seconds: float = 1.0) -> None:
    """A run of the model comes and goes."""
    run = world.open(ref=ref)
    if run.state == "queued":
        world.ready(world.started[-1])
    assert run.state == "bound"
    world.now += seconds
    world.core.stop(run, "done", world.now)


def make_leave(world: World) -> None:
    for group in list(world.core.fleet.groups.values()):
        if group.state == "leaving":
            world.leave(group)


def test_a_third_model_drives_out_the_one_that_is_idle_longest():
    world = world_for_two()
    used(world, A)
    used(world, B)
    run = world.open(ref=C)
    assert groups(world) == {"a": "leaving", "b": "ready", "c": "waiting"}
    assert [event.phase for event in world.of(run.reopen)] == ["waiting"]
    make_leave(world)
    world.ready(world.started[-1])
    assert run.state == "bound"
    assert groups(world) == {"b": "ready", "c": "ready"}


def test_what_is_quickly_loaded_again_goes_before_what_takes_long():
    world = world_for_two()
    slow = world.open(ref=A)
    world.now += 60.0  # it took a minute to load
    world.ready(world.started[-1])
    world.core.stop(slow, "done", world.now)
    used(world, B)
    world.now += 10.0
    world.open(ref=C)
    assert groups(world) == {"a": "ready", "b": "leaving", "c": "waiting"}


def test_no_more_goes_than_must():
    world = World(devices=ONE, memory_total=160, parameters=SIZES)
    for ref in (A, B, C):
        used(world, ref)
    world.open(ref=m.ModelRef(kind="k", name="large"))  # 120 of 160: all three hold 120, 40 are free
    assert sorted(groups(world).values()) == ["leaving", "leaving", "ready", "waiting"]


def test_a_model_that_a_run_uses_stays_and_the_other_goes():
    world = world_for_two()
    run = world.open_ready(ref=A)
    used(world, B)
    world.open(ref=C)
    assert groups(world) == {"a": "ready", "b": "leaving", "c": "waiting"}
    assert run.state == "bound"


def test_a_model_that_nobody_can_make_room_for_waits_until_a_run_ends():
    world = world_for_two()
    first, second = world.open_ready(ref=A), world.open_ready(ref=B)
    third = world.open(ref=C)
    assert groups(world) == {"a": "ready", "b": "ready", "c": "waiting"}
    world.core.stop(second, "done", world.now)
    assert groups(world)["b"] == "leaving"
    make_leave(world)
    world.ready(world.started[-1])
    assert (first.state, third.state) == ("bound", "bound")


def test_after_a_while_models_in_use_take_no_further_runs_and_make_room():
    """Else runs of a model that is loved by many would keep all others out for ever."""
    world = world_for_two(patience=30.0)
    loved = [world.open_ready(ref=A), world.open_ready(ref=B)]
    waits = world.open(ref=C)
    world.pass_time(31.0 - 5)
    for run in loved:
        run.touched = world.now
    another = world.open(ref=A)
    assert another.state == "bound"
    world.pass_time(6.0)
    late = [world.open(ref=A), world.open(ref=B)]
    held = world.core.fleet.held
    assert len(held) == 1  # one of the two is enough
    assert sorted(run.state for run in late) == ["bound", "queued"]
    (kept_off,) = (run for run in late if run.state == "queued")
    for run in [r for r in world.core.runs.values() if r.group in held]:
        world.core.stop(run, "done", world.now)
    make_leave(world)
    assert world.started[-1].ref == C
    world.ready(world.started[-1])
    assert waits.state == "bound"
    assert kept_off.state == "queued"  # its model comes back when there is room
    assert groups(world)[kept_off.ref.name] == "waiting"
    world.core.stop(waits, "done", world.now)
    make_leave(world)
    world.ready(world.started[-1])
    assert kept_off.state == "bound"


def test_who_waits_for_room_is_not_passed_by_who_needs_less():
    world = World(devices=ONE, memory_total=160, parameters=SIZES)
    using = [world.open_ready(ref=A), world.open_ready(ref=B)]
    world.open(ref=m.ModelRef(kind="k", name="large"))
    world.open(ref=C)  # there is room for it, but it would be taken from who came first
    assert groups(world) == {"a": "ready", "b": "ready", "large": "waiting", "c": "waiting"}
    world.core.stop(using[0], "done", world.now)
    make_leave(world)
    assert groups(world) == {"b": "ready", "large": "starting", "c": "waiting"}


def test_first_come_is_first_served_in_the_same_memory():
    world = World(devices=ONE, memory_total=160, parameters=SIZES)
    using = world.open_ready(ref=A)
    large = world.open(ref=m.ModelRef(kind="k", name="large"))
    small = world.open(ref=B)
    assert large.state == "queued"
    assert groups(world) == {"a": "ready", "large": "starting", "b": "waiting"}
    world.ready(world.started[-1])
    assert small.state == "queued"
    world.core.stop(using, "done", world.now)
    make_leave(world)
    world.ready(world.started[-1])
    assert small.state == "bound"


def test_a_model_that_is_larger_than_the_memory_is_refused_with_the_figures():
    world = world_for_two()
    with pytest.raises(XditError, match="out_of_memory") as refused:
        world.open(ref=m.ModelRef(kind="k", name="huge"))
    assert "huge needs" in refused.value.message
    assert world.core.fleet.groups == {}
    world.load(ref=m.ModelRef(kind="k", name="huge"))
    assert world.answers[-1][1].code == "out_of_memory"


def test_memory_that_another_program_holds_is_seen_and_told():
    world = world_for_two(memory_others=70)
    run = world.open(ref=A)
    assert groups(world) == {"a": "waiting"}
    world.pass_time(2.0)  # what a group of ours held may be on its way back
    assert run.state == "queued"
    world.pass_time(4.0)
    failed = world.end_of(run.reopen)
    assert failed.code == "out_of_memory"
    assert "another program" in failed.message
    assert world.core.fleet.groups == {}


def test_what_a_device_says_counts_beside_the_estimate():
    world = world_for_two()
    used(world, A)
    world.memory_others = 30  # of 100; the estimate alone would have room for two
    world.open(ref=B)
    assert groups(world) == {"a": "leaving", "b": "waiting"}


def test_a_model_stays_for_its_time_and_no_longer():
    keep = Keep(usual=10.0, of={"diffusion_models/b": math.inf, "diffusion_models/c": 0.0})
    world = World(devices=ONE, keep=keep)
    used(world, A)
    used(world, B)
    used(world, C)
    world.pass_time(0.1)
    assert groups(world) == {"a": "ready", "b": "ready", "c": "leaving"}
    world.pass_time(10.0)
    assert groups(world)["a"] == "leaving"
    world.pass_time(10_000.0)
    assert groups(world)["b"] == "ready"


def test_a_run_keeps_its_model_past_its_time():
    world = World(devices=ONE, keep=Keep(usual=0.0))
    run = world.open_ready(ref=A)
    world.pass_time(20.0)
    assert groups(world) == {"a": "ready"}
    world.core.stop(run, "done", world.now)
    world.pass_time(0.1)
    assert groups(world) == {"a": "leaving"}


def test_a_new_request_for_a_model_that_leaves_brings_it_back():
    world = World(devices=ONE, keep=Keep(usual=0.0))
    used(world, A)
    world.pass_time(0.1)
    run = world.open(ref=A)
    make_leave(world)
    world.ready(world.started[-1])
    assert (run.state, len(world.started)) == ("bound", 2)


def test_freeing_memory_ends_what_is_worth_least_and_spares_what_is_used():
    world = World(devices=ONE, memory_total=1000, parameters=SIZES)
    run = world.open_ready(ref=A)
    used(world, B)
    used(world, C)
    fleet = world.core.fleet
    assert [group.ref.name for group in fleet.free_memory(30, ONE, world.now)] == ["b"]
    assert [group.ref.name for group in fleet.free_memory(0, ONE, world.now)] == ["c"]
    assert fleet.free_memory(0, ONE, world.now) == []
    assert run.state == "bound"


def test_a_further_replica_drives_nobody_out_but_a_load_of_it_does():
    world = World(devices=("cpu:0", "cpu:1"), memory_total=100, parameters=SIZES)
    other = world.open(ref=B, devices=ONE)
    world.ready(world.started[-1])
    world.core.stop(other, "done", world.now)
    run = world.open(ref=A, replicas=2)
    assert groups(world) == {"b": "ready", "a": "starting"}
    world.ready(world.started[-1])
    assert run.state == "bound"
    world.load(ref=A, replicas=2)
    assert groups(world)["b"] == "leaving"


def test_all_ranks_are_counted_on_a_cpu_and_each_on_its_own_gpu():
    plan = m.Plan(devices=("cuda:0", "cuda:1"), ulysses=2)
    found, (key,) = World(parameters={"a": 10}).what(A)
    residency = Residency(SimpleNamespace(memory=lambda pool: None), margin=5)
    assert residency.needs(found, key) == {"cpu": 2 * (40 + 5)}
    on_gpus = type(key)(key.path, key.part, key.dtype, plan)
    assert residency.needs(found, on_gpus) == {"cuda:0": 45, "cuda:1": 45}
    split = type(key)(key.path, key.part, key.dtype, m.Plan(devices=("cuda:0", "cuda:1"), tensor=2))
    assert residency.needs(found, split) == {"cuda:0": 25, "cuda:1": 25}


def test_what_one_gpu_lacks_is_not_taken_from_another():
    world = World(devices=("cuda:0",), memory_total=50, parameters=SIZES)
    used(world, A)
    elsewhere = world.open(ref=B, devices=("cuda:1",))
    world.ready(world.started[-1])
    world.core.stop(elsewhere, "done", world.now)
    world.now += 1000.0
    world.open(ref=C, devices=("cuda:0",))
    assert groups(world) == {"a": "leaving", "b": "ready", "c": "waiting"}


def test_the_memory_of_cpu_ranks_is_counted_where_it_is_configured():
    devices = [Device("cpu:0", "CPU")]
    assert Memories(devices).memory("cpu") is None
    told = Memories(devices, cpu=1000).memory("cpu")
    assert isinstance(told, Memory)
    assert told.total == 1000


def test_a_daemon_that_stops_answers_who_waits_for_room():
    world = world_for_two()
    runs: list[Run] = [world.open_ready(ref=A), world.open_ready(ref=B), world.open(ref=C)]
    world.core.close(world.now)
    make_leave(world)
    assert world.end_of(runs[2].reopen).code == "run_cancelled"
    assert world.core.fleet.groups == {}


def test_a_load_that_waits_for_room_is_told_when_the_daemon_stops():
    world = world_for_two()
    world.open_ready(ref=A), world.open_ready(ref=B)
    request = world.load(ref=C)
    assert groups(world)["c"] == "waiting"
    world.core.close(world.now)
    assert world.end_of(request).code == "stopping"


def test_the_groups_of_a_vae_and_a_transformer_are_counted_together():
    world = World(devices=ONE, memory_total=60, parameters={REF.name: 10, VAE.name: 5})
    used(world, REF)
    used(world, VAE)
    assert groups(world) == {REF.name: "ready", VAE.name: "ready"}


def offloaded(name: str, world: World) -> Run:
    """A run of a model whose weights come for a turn."""
    ref = m.ModelRef(kind="diffusion_models", name=name)
    found, keys = world.what(ref)
    key = structs.replace(keys[0].plan, offload="model")
    keys = (replace(keys[0], plan=key),)
    return world.core.open(b"c", "test", m.OpenRun(id=world.request(), model=ref), found, keys, world.now)


def test_models_that_come_for_a_turn_need_room_for_the_largest_of_them():
    world = world_for_two()  # of a hundred bytes, a has 40; two of "d" and one of 40 are 160
    world.parameters |= {"d": 15, "e": 15}
    runs = [offloaded(name, world) for name in ("d", "e", "a")]
    for group in list(world.started):
        world.ready(group)
    assert [run.state for run in runs] == ["bound"] * 3
    assert world.core.fleet.residency.resident(world.core.fleet.groups.values(), "cpu") == 0
    used(world, B)
    run = world.open(ref=C)
    assert groups(world)["c"] == "waiting", "40 stay, and 60 come for a turn: 40 more are too many"
    assert groups(world)["b"] == "leaving"
    make_leave(world)
    world.ready(world.started[-1])
    assert run.state == "bound"


def test_what_comes_for_a_turn_makes_room_too_where_nothing_uses_it():
    world = World(devices=ONE, memory_total=100, parameters={"d": 20, "a": 10})
    run = offloaded("d", world)
    world.ready(world.started[-1])
    waiting = world.open(ref=A)
    assert (groups(world), waiting.state) == ({"d": "ready", "a": "waiting"}, "queued"), "a run uses it"
    world.core.stop(run, "done", world.now)
    assert groups(world) == {"d": "leaving", "a": "waiting"}
    make_leave(world)
    world.ready(world.started[-1])
    assert waiting.state == "bound"


def test_a_model_that_could_never_come_for_a_turn_is_too_large():
    world = world_for_two()
    with pytest.raises(XditError, match="needs"):
        offloaded("large", world)


def test_the_hosts_memory_must_have_room_for_what_is_offloaded_from_a_gpu():
    world = World(devices=("cuda:0",), memory_total=100, parameters=SIZES, host_free=49)
    run = offloaded("a", world)
    assert run.code == "out_of_memory"
    assert "host's memory" in run.problem
    world.host_free = 51
    assert offloaded("a", world).state == "queued"
    assert groups(world) == {"a": "starting"}


def test_who_sleeps_in_the_hosts_memory_goes_for_a_model_that_is_offloaded_there():
    world = World(
        devices=("cuda:0",), memory_total=100, parameters=SIZES, host_free=100, keep=Keep(awake=10.0)
    )
    for ref in (A, B):
        used(world, ref)
        world.pass_time(11.0)
        world.rest(world.started[-1], asleep=True)
    assert groups(world) == {"a": "asleep", "b": "asleep"}
    world.host_free = 20  # each of them has 40, and ten are left to others
    run = offloaded("c", world)
    assert groups(world) == {"a": "leaving", "b": "asleep", "c": "waiting"}, "the one that is idle longest"
    world.core.tick(world.now)
    assert groups(world) == {"a": "leaving", "b": "asleep", "c": "waiting"}, "its memory is on its way"
    world.host_free = 60
    make_leave(world)
    assert groups(world) == {"b": "asleep", "c": "starting"}
    world.ready(world.started[-1])
    assert run.state == "bound"


def test_two_models_that_are_offloaded_at_once_do_not_count_on_the_same_room():
    world = World(devices=("cuda:0",), memory_total=100, parameters=SIZES, host_free=80)
    first, second = offloaded("a", world), offloaded("b", world)
    assert groups(world) == {"a": "starting", "b": "waiting"}, "there is room for either, and not for both"
    world.host_free = 40  # the first has taken its own
    world.ready(world.started[0])
    assert (first.state, second.code) == ("bound", "out_of_memory")
