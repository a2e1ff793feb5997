"""LoRAs that lie beside weights in fp8 take memory of the devices: it is counted before a run has them, and room is made for it."""

from __future__ import annotations

import pytest

from tests.daemon.world import World
from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group
from xditd.daemon.residency import SETTLE
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError

FLUX, OTHER = (m.ModelRef(kind="diffusion_models", name=name) for name in ("flux", "other"))
FP8 = "float8_e4m3fn"
SMALL, INK, HUGE = ("small", 1.0), ("ink", 0.8), ("huge", 1.0)
CODE = "out_of_memory"


def world_of_a_hundred(**arguments: int) -> World:
    """Bytes, on one device: flux in fp8 takes 30 of them, the other model 40, ink 40 and the huge LoRA 80."""
    world = World(devices=("cpu:0",), memory_total=100, **arguments)
    world.parameters = {"flux": 30, "other": 10}
    world.lora_bytes = {"small": 10, "ink": 40, "huge": 80}
    return world


def flux(world: World, *loras: tuple[str, float], ladder: Ladder | None = None) -> Run:
    return world.open(ref=FLUX, loras=loras, weight_dtype=FP8, ladder=ladder)


def served(world: World, run: Run) -> Run:
    if run.state == "queued":
        world.ready(world.started[-1])
    assert run.state == "bound"
    return run


def replicas(world: World) -> list[Group]:
    """Two of flux, each on a device of its own, that serve and have no run."""
    world.devices = ("cuda:0", "cuda:1")
    runs = [world.open(ref=FLUX, replicas=2, weight_dtype=FP8) for _ in range(2)]
    for group in list(world.started):
        world.ready(group)
    for run in runs:
        end(world, run)
    return list(world.core.fleet.groups.values())


def states(world: World) -> dict[str, str]:
    return {group.ref.name: group.state for group in world.core.fleet.groups.values()}


def end(world: World, run: Run) -> None:
    world.core.stop(run, "done", world.now)


def gone(world: World, name: str) -> None:
    (group,) = (one for one in world.core.fleet.groups.values() if one.ref.name == name)
    assert group.state == "leaving"
    world.leave(group)


def counted(world: World) -> int:
    return world.core.fleet.residency.resident(world.core.fleet.groups.values(), "cpu:0")


def had(world: World, run: Run) -> bool:
    """Whether the ranks were told to have the run's LoRAs."""
    return any(isinstance(order, o.SetLoras) and order.run == run.id for _, order in world.orders)


def test_a_model_starts_where_its_weights_and_the_loras_that_it_is_wanted_with_have_room() -> None:
    world = world_of_a_hundred()
    other = served(world, world.open(ref=OTHER))
    run = flux(world, INK)
    assert states(world) == {"other": "ready", "flux": "waiting"}, "30 and 40 beside 40 are more than 100"
    end(world, other)
    gone(world, "other")
    served(world, run)
    assert counted(world) == 70


def test_loras_that_are_merged_take_nothing() -> None:
    world = world_of_a_hundred()
    served(world, world.open(ref=OTHER, loras=[HUGE]))
    assert counted(world) == 40


def test_for_loras_of_a_model_that_serves_an_idle_one_goes_before_they_are_had() -> None:
    world = world_of_a_hundred()
    end(world, served(world, world.open(ref=OTHER)))
    end(world, served(world, flux(world)))
    assert counted(world) == 70
    run = flux(world, INK)
    assert states(world) == {"other": "leaving", "flux": "ready"}
    assert (run.state, had(world, run)) == ("queued", False)
    gone(world, "other")
    assert (run.state, had(world, run)) == ("bound", True)
    assert len(world.started) == 2, "the model itself has stayed"
    assert counted(world) == 70


def test_loras_for_which_models_in_use_leave_no_room_are_waited_for_in_line() -> None:
    world = world_of_a_hundred()
    other = served(world, world.open(ref=OTHER))
    end(world, served(world, flux(world)))
    run, late = flux(world, INK), flux(world)
    assert (run.state, late.state) == ("queued", "queued"), "nobody passes"
    assert states(world) == {"other": "ready", "flux": "ready"}
    end(world, other)
    gone(world, "other")
    assert (run.state, late.state) == ("bound", "queued")
    end(world, run)
    assert late.state == "bound"


def test_after_a_while_a_model_that_is_loved_makes_room_for_loras() -> None:
    world = world_of_a_hundred()
    loved = served(world, world.open(ref=OTHER))
    end(world, served(world, flux(world)))
    run = flux(world, INK)
    for _ in range(4):
        world.pass_time(10.0)
        loved.touched = world.now
    assert world.open(ref=OTHER).state == "queued"
    end(world, loved)
    gone(world, "other")
    assert run.state == "bound"


def test_what_is_let_go_of_is_not_counted_any_more() -> None:
    world = world_of_a_hundred()
    end(world, served(world, flux(world, INK)))
    assert counted(world) == 70, "they lie there until a run has others"
    end(world, served(world, flux(world, SMALL)))
    assert counted(world) == 40
    end(world, served(world, flux(world)))
    assert counted(world) == 30
    served(world, world.open(ref=OTHER))
    assert states(world) == {"flux": "ready", "other": "ready"}


def test_who_sleeps_has_no_loras_and_wakes_with_room_for_those_it_is_called_for() -> None:
    world = world_of_a_hundred(host_free=100)
    end(world, served(world, flux(world, INK)))
    (group,) = world.started
    world.core.sleep([group], world.now)
    world.rest(group, asleep=True)
    assert counted(world) == 0
    end(world, served(world, world.open(ref=OTHER)))
    plain = flux(world)
    assert (group.state, counted(world)) == ("waking", 70)
    end(world, plain)
    world.rest(group, asleep=False)
    assert states(world) == {"flux": "ready", "other": "ready"}
    flux(world, INK)
    assert states(world)["other"] == "leaving"


def test_loras_for_which_there_is_never_room_are_refused_or_had_with_a_plan_below() -> None:
    world = world_of_a_hundred()
    served(world, flux(world))
    with pytest.raises(XditError, match=r"flux with its LoRAs needs .* on cpu") as refused:
        flux(world, HUGE)
    assert refused.value.code == CODE
    (key,) = world.what(FLUX, weight_dtype=FP8)[1]
    below = m.Plan(devices=("cpu:0",), weight_dtype=FP8, offload="layerwise")
    run = flux(world, HUGE, ladder=Ladder.of((key.plan,), (below,)))
    assert run.key.plan.offload == "layerwise"
    assert "with its LoRAs" in run.ladder.degraded


def test_where_another_program_holds_the_room_of_loras_the_model_serves_on_without_them() -> None:
    world = world_of_a_hundred(memory_others=50)
    first = served(world, flux(world))
    run = flux(world, INK)
    assert run.state == "queued"
    world.pass_time(SETTLE + 1)
    plain = flux(world)
    assert (run.code, first.state, plain.state) == (CODE, "bound", "bound")
    told = world.end_of(run.reopen)
    assert told.code == CODE
    assert "What LoRAs add to flux needs" in told.message
    assert "another program" in told.message
    assert states(world) == {"flux": "ready"}


def test_where_a_model_that_starts_lacks_room_for_loras_alone_others_are_served() -> None:
    world = world_of_a_hundred(memory_others=50)
    run, plain = flux(world, INK), flux(world)
    assert states(world) == {"flux": "waiting"}
    world.pass_time(SETTLE + 1)
    assert run.code == CODE
    served(world, plain)


def test_whose_loras_are_small_enough_is_not_refused_with_whose_are_not() -> None:
    world = world_of_a_hundred(memory_others=50)
    end(world, served(world, flux(world)))
    large, small = flux(world, INK), flux(world, SMALL)
    world.pass_time(SETTLE + 1)
    assert (large.code, small.code, small.state) == (CODE, "", "bound")


def test_where_no_replica_can_have_room_for_loras_nobody_waits_for_ever() -> None:
    world = world_of_a_hundred(memory_others=50)
    two = replicas(world)
    run, plain = (world.open(ref=FLUX, replicas=2, weight_dtype=FP8, loras=loras) for loras in ([INK], []))
    assert [run.state, plain.state] == ["queued", "bound"]
    world.pass_time(SETTLE + 1)
    assert (run.code, world.end_of(run.reopen).code) == (CODE, CODE)
    assert [group.state for group in two] == ["ready", "ready"]


def test_who_may_yet_be_served_by_a_replica_keeps_no_other_from_being_refused() -> None:
    world = world_of_a_hundred(memory_others=50)
    world.devices = ("cuda:0", "cuda:1")
    first = world.open(ref=FLUX, replicas=2, weight_dtype=FP8)
    world.ready(world.started[0])  # the other starts yet
    end(world, first)
    hopes = world.open(ref=FLUX, replicas=2, weight_dtype=FP8, loras=[INK])
    end(world, served(world, world.open(ref=OTHER, devices=("cuda:2",), weight_dtype=FP8)))
    run = world.open(ref=OTHER, devices=("cuda:2",), weight_dtype=FP8, loras=[HUGE])
    world.pass_time(SETTLE + 1)
    assert [hopes.state, hopes.code, run.code] == ["queued", "", CODE]


def test_of_replicas_one_has_room_made_for_loras() -> None:
    world = world_of_a_hundred()
    replicas(world)
    run = world.open(ref=FLUX, replicas=2, weight_dtype=FP8, loras=[INK])
    assert run.state == "bound"
    residency, everybody = world.core.fleet.residency, world.core.fleet.groups.values()
    assert sorted(residency.resident(everybody, device) for device in world.devices) == [30, 70]
