"""What there is instead of a plan that cannot be had, and which failures lead there; no rank is needed for it."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.daemon.test_planner import GPUS, VAE, flux
from tests.daemon.world import REF, World
from xditd.daemon.chronicle import Chronicle
from xditd.daemon.fallback import LEADS_DOWN, Ladder, Lately, spell
from xditd.daemon.planner import plan, rungs
from xditd.daemon.runs import Run
from xditd.daemon.sight import Sight
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.tensors import Tensor

TWO = m.Plan(devices=("cpu:0", "cpu:1"), ulysses=2)
ONE = m.Plan(devices=("cpu:0",), reason="one device")


OFFLOADED = [f"The plan on cuda:0 with {offload} offload" for offload in ("model", "layerwise")]


IN_FP8 = " with weights in the file's fp8"


def below(**asked: object) -> list[str]:
    return [spell(rung) for rung in rungs(plan(m.PlanRequest(**asked), flux(), GPUS), flux())]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"ulysses": 4}, ["ulysses 2 on cuda:0, cuda:1", "The plan on cuda:0", *OFFLOADED]),
        (
            {"ulysses": 2, "ring": 2},
            ["ulysses 2 on cuda:0, cuda:1", "The plan on cuda:0", *OFFLOADED],
        ),
        (
            {"strategy": "Tensor", "devices": ("2", "3")},
            ["The plan on cuda:2", *(one.replace(":0", ":2") for one in OFFLOADED)],
        ),
        (
            {"strategy": "CFG", "devices": ("0-3",)},
            ["cfg 2 on cuda:0, cuda:1", "The plan on cuda:0", *OFFLOADED],
        ),
        (
            {"strategy": "PipeFusion", "devices": ("0-3",)},
            ["pipefusion 2 on cuda:0, cuda:1", "The plan on cuda:0", *OFFLOADED],
        ),
        (
            {"ulysses": 4, "shard": True},
            ["ulysses 2 on cuda:0, cuda:1 with sharded weights", "The plan on cuda:0", *OFFLOADED],
        ),
        ({"ring": 3, "devices": ("0-2",)}, ["The plan on cuda:0", *OFFLOADED]),
        ({"devices": ("0",)}, OFFLOADED),
        ({"devices": ("0",), "offload": "model"}, OFFLOADED[1:]),
        ({"devices": ("0",), "offload": "layerwise"}, []),
    ],
    ids=str,
)
def test_the_ladder_of_a_plan_is_its_strategy_with_half_the_devices_one_and_offload(asked, expected):
    assert below(**asked) == expected


def test_for_want_of_memory_a_file_in_fp8_stays_so_before_all_else() -> None:
    """The numbers are the same. For want of a device its weights need not be kept otherwise."""
    info = structs.replace(flux(), dtype="float8_e4m3fn")
    two = plan(m.PlanRequest(ulysses=2), info, GPUS)
    top = Ladder.of((two,), rungs(two, info))

    def descent(ladder: Ladder, code: str) -> list[str]:
        seen = []
        while (lower := ladder.down("start", code, "no")) is not None:
            below, ladder = lower
            seen.append(spell(below))
        return seen

    assert descent(top, "out_of_memory") == [
        f"ulysses 2 on cuda:0, cuda:1{IN_FP8}",
        f"The plan on cuda:0{IN_FP8}",
        *(f"{one}{IN_FP8}" for one in OFFLOADED),
    ]
    assert descent(top, "load_failed") == ["The plan on cuda:0"]
    asked = plan(m.PlanRequest(ulysses=2, weight_dtype="float8_e5m2"), flux(), GPUS)
    rounded = Ladder.of((asked,), rungs(asked, flux()))
    assert descent(rounded, "load_failed") == ["The plan on cuda:0 with weights in float8_e5m2"]


def test_a_vae_is_not_offloaded_layer_by_layer():
    assert [spell(rung) for rung in rungs(plan(m.PlanRequest(), VAE, GPUS), VAE)] == OFFLOADED[:1]


def test_a_rung_leaves_out_the_devices_on_which_something_failed():
    four = plan(m.PlanRequest(ulysses=4), flux(), GPUS)
    ladder = Ladder.of((four,), rungs(four, flux()))
    two, ladder = ladder.down("start", "out_of_memory", "It is full.", "cuda:0")
    assert two.devices == ("cuda:1", "cuda:2")
    one, ladder = ladder.down("turn", "rank_lost", "It died.", "cuda:1")
    assert one.devices == ("cuda:2",)
    assert ladder.degraded == f"{spell(four)} could not be had: It is full; then: It died"
    assert ladder.down("turn", "rank_lost", "It died.") is None


@pytest.mark.parametrize("code", ["bad_plan", "file_invalid", "stopping", "not_built", "draining"])
def test_what_would_fail_on_one_device_too_leads_nowhere(code):
    ladder = Ladder.of((TWO,), (ONE,))
    assert ladder.down("start", code, "No.") is None
    assert ladder.down("turn", code, "No.") is None
    assert ("turn", "rank_failed") not in LEADS_DOWN, "what raised is refused: decision 0004"


def test_what_failed_is_remembered_for_a_while_unless_forgiven():
    lately = Lately(60.0)
    lately.failed("a", "load_failed", "It raised.", "cuda:1", 0.0)
    lately.failed("b", "file_invalid", "It is cut off.", "", 0.0)
    assert lately.problem(["a"], 59.0) == ("load_failed", "It raised.", "cuda:1")
    assert lately.problem(["a", "c"], 1.0) is None, "a replica may do"
    assert lately.problem(["b"], 1.0) is None, "the file may be another one now"
    assert lately.problem(["a"], 60.0) is None
    lately.forgive("a")
    assert lately.problem(["a"], 1.0) is None


# ------------------------------------------------------------------------------------- in the daemon's core


def open_run(world: World) -> Run:
    found, keys = world.what(REF)
    request = m.OpenRun(id=world.request(), model=REF)
    ladder = Ladder.of(tuple(key.plan for key in keys), (ONE,))
    return world.core.open(b"comfy", "test", request, found, keys, world.now, (), ladder)


def test_a_run_whose_plan_fails_at_the_start_is_opened_on_one_device_and_told():
    world = World()
    run = open_run(world)
    (first,) = world.started
    world.core.fleet.fail(first, "rank_failed", "Rank 0: No such luck", world.now, "cpu:0")
    second = world.started[-1]
    assert second.devices == ("cpu:1",)
    world.ready(second)
    opened = world.end_of(run.reopen)
    assert isinstance(opened, m.RunOpened)
    assert opened.plan.devices == ("cpu:1",)
    assert "No such luck" in opened.degraded
    assert second.degraded == opened.degraded
    world.leave(first)
    assert list(world.core.fleet.groups) == [second.name], "nobody waits for the plan any more"

    started = len(world.started)
    again = open_run(world)
    assert len(world.started) == started
    assert again.group == second.name
    assert "No such luck" in world.end_of(again.reopen).degraded


@pytest.fixture
def watched() -> World:
    """A world whose runs are told of, as the daemon tells of them."""
    sight = Sight(Chronicle(lambda peer, told: world.answer(peer, told), lambda: world.now))
    world = World(memory_total=9, witness=sight)
    sight.chronicle.watch(b"top", m.Watch(id=world.request()))
    return world


def heard(world: World, run: int) -> list[str]:
    told = [event for peer, event in world.answers if peer == b"top" and isinstance(event, m.Happened)]
    return [event.event for event in told if event.run == run]


def test_who_watches_hears_of_a_run_before_it_hears_that_it_goes_on_with_less(watched):
    first = open_run(watched)
    watched.core.fleet.fail(watched.started[-1], "rank_failed", "Rank 0: No such luck", watched.now, "cpu:0")
    watched.ready(watched.started[-1])
    again = open_run(watched)
    assert again.ladder.degraded
    for run in (first, again):
        assert heard(watched, run.id) == ["run_opened", "run_degraded"]


def test_who_watches_hears_of_a_run_before_it_hears_of_its_end(watched):
    watched.memory_others = 9
    first = watched.open()
    watched.now += 6.0  # nobody has looked since, and now there is no hope
    second = watched.open()
    for run in (first, second):
        assert (run.code, heard(watched, run.id)) == ("out_of_memory", ["run_opened", "run_ended"])


def test_the_last_rung_fails_with_its_own_code():
    world = World()
    run = open_run(world)
    world.core.fleet.fail(world.started[-1], "rank_failed", "Rank 1: No such luck", world.now)
    world.core.fleet.fail(world.started[-1], "out_of_memory", "Rank 0: It is full", world.now)
    failed = world.end_of(run.reopen)
    assert isinstance(failed, m.Failed)
    assert failed.code == "out_of_memory"


def test_a_request_is_asked_again_of_one_device_when_the_plan_has_lost_its_ranks_three_times():
    world = World()
    run = open_run(world)
    world.ready(world.started[-1])
    asked = world.sample(run, steps=1)
    for _ in range(3):
        group = world.group(run)
        world.die(group, rank=1)
        if run.state == "queued":
            world.pass_time(1.0)
            world.ready(world.started[-1])
    assert world.group(run).devices == ("cpu:0",)
    world.finish_turn(world.group(run))
    rebounds = [event for event in world.of(asked) if isinstance(event, m.Rebound)]
    assert [bool(event.degraded) for event in rebounds] == [False, False, True]
    assert world.end_of(asked).degraded == rebounds[-1].degraded


def test_a_run_that_was_asked_nothing_meanwhile_is_told_with_its_next_request():
    world = World()
    run = open_run(world)
    world.ready(world.started[-1])
    world.die(world.group(run))
    second = world.started[-1]
    world.core.fleet.fail(second, "rank_failed", "Rank 1: No such luck", world.now)
    world.ready(world.started[-1])
    for told in (1, 0):
        asked = world.denoise(run)
        assert len([event for event in world.of(asked) if isinstance(event, m.Rebound)]) == told
        world.finish_turn(world.group(run))


def test_a_model_that_is_too_large_for_one_device_stays_refused():
    world = World(memory_total=100, parameters={REF.name: 60})
    found, keys = world.what(REF)
    request = m.OpenRun(id=world.request(), model=REF)
    with pytest.raises(Exception, match="needs") as refused:
        world.core.open(b"comfy", "test", request, found, keys, world.now, (), Ladder.of((TWO,), (ONE,)))
    assert refused.value.code == "out_of_memory"


# ------------------------------------------------------------------------------------------ for want of memory

OFFLOADS = tuple(m.Plan(devices=("cpu:0",), offload=offload) for offload in ("model", "layerwise"))
BATCH = Tensor(dtype="float32", shape=(3, 16, 8, 8), segment=1)


def test_only_a_lack_of_memory_leads_to_offload_and_to_splitting():
    ladder = Ladder.of((TWO,), (ONE, *OFFLOADS), splits=True)
    one, below = ladder.down("start", "load_failed", "It raised.", batch=3)
    assert one.devices == ("cpu:0",)
    assert below.down("start", "load_failed", "It raised.") is None
    assert below.down("turn", "rank_lost", "It died.", batch=3) is None
    full, below = below.down("start", "out_of_memory", "It is full.")
    assert (full.offload, below.singly) == ("model", False)
    last, below = below.down("turn", "out_of_memory", "It is full.")
    assert last.offload == "layerwise"
    assert below.down("turn", "out_of_memory", "It is full.") is None


def test_a_batch_is_split_before_the_last_of_several_devices_is_given_up_and_once():
    four = plan(m.PlanRequest(ulysses=4), flux(), GPUS)
    ladder = Ladder.of((four,), rungs(four, flux()), splits=True)
    seen = []
    while (lower := ladder.down("turn", "out_of_memory", "It is full.", batch=3)) is not None:
        rung, ladder = lower
        seen.append((spell(rung), ladder.singly))
    assert [one for one in seen if one[0].startswith("ulysses 2")] == [
        ("ulysses 2 on cuda:0, cuda:1", False),
        ("ulysses 2 on cuda:0, cuda:1", True),
    ]
    assert [one for one, singly in seen[2:] if singly] == ["The plan on cuda:0", *OFFLOADED]
    assert ladder.degraded.endswith("; batches are computed one item after another")


def test_the_patches_of_a_pipeline_are_not_split():
    pipeline = m.Plan(devices=("cpu:0", "cpu:1"), pipefusion=2)
    rung, ladder = Ladder.of((pipeline,), (ONE,), splits=True).down("turn", "out_of_memory", "Full.", batch=3)
    assert (rung.devices, ladder.singly) == (("cpu:0",), False)


def test_a_turn_without_memory_is_done_item_by_item_in_its_group_and_then_with_offload():
    world = World(devices=("cpu:0",))
    found, keys = world.what(REF)
    request = m.OpenRun(id=world.request(), model=REF)
    ladder = Ladder.of(tuple(key.plan for key in keys), OFFLOADS, splits=True)
    run = world.core.open(b"comfy", "test", request, found, keys, world.now, (), ladder)
    first = world.started[-1]
    world.ready(first)
    work = m.Sample(
        id=world.request(), run=run.id, sampler="euler", sigmas=(1.0, 0.0), noise=BATCH, conditioning="c"
    )

    def lack(group: object) -> None:
        failed = o.RankFailed(
            rank=0, order=group.turn, code="out_of_memory", message="It is full.", traceback="", alive=True
        )
        world.core.rank_failed(group, failed, world.now)

    world.core.ask(run, work, (), world.now)
    lack(first)
    assert world.group(run) is first, "nothing has to be loaded for it"
    orders = [order for _, order in world.orders]
    assert [order.singly for order in orders if isinstance(order, o.BeginSample)] == [False, True]
    assert [type(order) for order in orders].count(o.ForgetRun) == 1
    told = [event for event in world.of(work.id) if isinstance(event, m.Rebound)]
    assert "one item after another" in told[-1].degraded

    lack(first)
    for offload in ("model", "layerwise"):
        world.ready(world.started[-1])
        assert world.group(run).key.plan.offload == offload
        if offload == "model":
            lack(world.group(run))
    world.finish_turn(world.group(run))
    done = world.end_of(work.id)
    assert isinstance(done, m.Sampled)
    assert done.degraded.count("It is full") == 3


def test_what_is_never_to_be_degraded_fails_with_its_code():
    world = World(devices=("cpu:0",))
    run = world.open_ready()
    asked = world.sample(run, steps=1)
    group = world.group(run)
    failed = o.RankFailed(
        rank=0, order=group.turn, code="out_of_memory", message="It is full.", traceback="", alive=True
    )
    world.core.rank_failed(group, failed, world.now)
    assert world.end_of(asked).code == "out_of_memory"
