"""Who waits, how long, and behind whom: for a place on a group, and there for the next turn."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.world import DEADLINES, VAE, World
from xditd.daemon import states
from xditd.daemon.runs import Run
from xditd.protocol import messages as m
from xditd.protocol.errors import XditError


def busy_world(**arguments) -> tuple[World, Run]:
    """A group with one place, and a run on it."""
    world = World(places=1, **arguments)
    return world, world.open_ready(peer=b"first")


def let_in(world: World) -> list[bytes]:
    """Ends the run that has the place, again and again: whose runs come next."""
    order = []
    while True:
        bound = [run for run in world.core.runs.values() if run.group]
        if not bound:
            return order
        order.append(bound[0].peer)
        world.core.stop(bound[0], "done", world.now)


def opened(world: World, peers: str, **arguments) -> list[Run]:
    return [world.open(peer=peer.encode(), **arguments) for peer in peers]


# ------------------------------------------------------------------------------------------- for a place


def test_clients_come_in_turn_whatever_number_of_runs_each_has():
    world, _ = busy_world()
    opened(world, "aaaabbc")
    assert b"".join(let_in(world)[1:]) == b"abcabaa"


def test_a_client_that_has_a_place_comes_after_those_that_have_none():
    world = World(places=2)
    world.open_ready(peer=b"a")
    world.open(peer=b"b")
    opened(world, "abc")
    assert [run.peer for run in world.core.runs.line.in_order(world.now)] == [
        b"c",
        b"a",
        b"b",
    ]


def test_a_higher_priority_goes_first():
    world, _ = busy_world()
    opened(world, "ab")
    opened(world, "c", priority=1)
    opened(world, "d", priority=-1)
    assert b"".join(let_in(world)[1:]) == b"cabd"


def test_who_waits_for_minutes_comes_before_a_stream_of_urgent_runs():
    world, _ = busy_world()
    (patient,) = opened(world, "a", priority=-2)
    world.now += 5 * 60
    opened(world, "b", priority=2)
    assert world.core.runs.line.in_order(world.now)[0] is patient


@given(
    runs=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-2, 2), st.floats(0, 200)), max_size=30),
    given=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5)),
    gone=st.sets(st.integers(0, 29), max_size=8),
)
def test_who_is_let_in_one_by_one_is_let_in_in_the_order_that_clients_were_told(runs, given, gone):
    """The line that is told looks at all who wait; the one that gives places away looks at changes alone."""
    world = World(places=0)
    for client, places in given.items():
        world.open(peer=client.encode())
        for _ in range(places):
            world.core.runs.line.given(client.encode())
    begin, numbers = world.now, count()
    for client, priority, later in sorted(runs, key=lambda run: run[2]):
        world.now = begin + later
        run = world.open(peer=client.encode(), priority=priority)
        world.core.runs.line.firsts(world.now)  # it has been looked at as it was before
        if next(numbers) in gone:
            world.core.stop(run, "gone", world.now)
    world.now += 100
    line = world.core.runs.line
    told = line.in_order(world.now)
    let_in = []
    while firsts := line.firsts(world.now):
        (run,) = firsts  # all wait for the same
        line.drop(run)
        line.given(run.peer)
        let_in.append(run)
    assert let_in == told


def test_runs_for_a_full_model_do_not_stand_in_the_way_of_those_for_another():
    world, _ = busy_world(devices=("cpu:0", "cpu:1"))
    opened(world, "ab")
    other = world.open(peer=b"c", ref=VAE)
    world.ready(world.started[-1])
    assert other.state == "bound"


def test_the_client_hears_its_position_and_again_when_it_changes():
    world, first = busy_world()
    a, b = opened(world, "ab")
    assert [event.position for event in world.of(b.reopen)] == [1]
    world.core.stop(first, "done", world.now)
    assert a.state == "bound"
    world.pass_time(1.0)
    world.pass_time(1.0)  # nothing new
    assert [event.position for event in world.of(b.reopen)] == [1, 0]


def test_the_estimate_is_nil_until_a_run_has_told_how_long_one_lasts():
    world, first = busy_world()
    (a,) = opened(world, "a")
    assert world.of(a.reopen)[0].estimate is None
    world.now += 8.0
    world.core.stop(first, "done", world.now)
    (b, c) = opened(world, "bc")
    assert world.of(b.reopen)[0].estimate == 8.0
    assert world.of(c.reopen)[0].estimate == 16.0


def test_the_estimate_of_a_load_is_what_is_left_of_the_last_one():
    world = World()
    run = world.open()
    world.now += 20.0
    group = world.started[0]
    world.ready(group)
    world.core.stop(run, "done", world.now)
    world.core.unload([group], False, world.now)
    world.leave(group)
    again = world.open()
    assert world.of(again.reopen)[0].estimate == 20.0


def test_the_line_is_bounded_and_says_so():
    world, _ = busy_world(queue=2)
    opened(world, "ab")
    with pytest.raises(XditError, match="queue_full"):
        world.open()


def test_who_has_waited_past_the_deadline_is_told():
    world, first = busy_world()
    (run,) = opened(world, "a")
    first.touched = world.now + DEADLINES.queued  # its client keeps asking
    world.pass_time(DEADLINES.queued + 1)
    failed = world.end_of(run.reopen)
    assert failed.code == "deadline_exceeded"
    assert "deadlines.queued" in failed.message


def test_a_run_that_lost_its_group_has_no_deadline_in_line_but_keeps_its_request():
    world = World(restart_limit=10)
    run = world.open_ready()
    request = world.denoise(run)
    world.die(world.group(run))
    world.now += DEADLINES.queued + 1
    world.ready(world.started[-1])
    world.finish_turn(world.group(run))
    assert isinstance(world.end_of(request), m.Denoised)


@pytest.mark.parametrize("state", sorted({state for state, _ in states.RUN}))
def test_a_run_can_be_cancelled_in_every_state(state):
    world = World(places=1)
    run = world.open_ready() if state != "queued" else world.open()
    request = world.denoise(run) if state == "working" else run.reopen
    behind = world.open(peer=b"behind")
    assert run.state == state
    world.core.stop(run, "cancelled", world.now)
    if state == "working":  # rank 0 may still write to its slots
        world.finish_turn(world.started[0])
    if state == "queued":
        world.ready(world.started[0])
    if state != "bound":
        assert world.end_of(request).code == "run_cancelled"
    assert world.ended == [run.id]
    assert behind.state == "bound"  # the place is given on


def test_a_run_that_waits_for_memory_can_be_cancelled_and_its_group_is_dropped():
    world = World(memory_total=8, parameters={"flux.safetensors": 1})
    world.denoise(world.open_ready())
    waits = world.open(ref=VAE)
    assert [group.state for group in world.core.fleet.groups.values()] == ["ready", "waiting"]
    world.core.stop(waits, "cancelled", world.now)
    assert world.end_of(waits.reopen).code == "run_cancelled"
    assert len(world.core.fleet.groups) == 1


# ------------------------------------------------------------------------------------------- for a turn


def turns_by_client(world: World, runs: list[Run], turns: int, seconds: dict[bytes, float]) -> list[bytes]:
    """Every run always has a step to ask for; a turn takes what its client's do."""
    peers = {run.id: run.peer for run in runs}
    for run in runs:
        world.denoise(run)
    group = world.group(runs[0])
    order = []
    for _ in range(turns):
        run = next(r for r in runs if r.id == world.turns()[-1])
        order.append(peers[run.id])
        world.now += seconds[run.peer]
        world.finish_turn(group)
        world.denoise(run)
    return order


def test_a_client_with_three_runs_gets_no_more_turns_than_one_with_one():
    world = World()
    runs = [world.open_ready(peer=peer) for peer in (b"a", b"a", b"a", b"b")]
    order = turns_by_client(world, runs, 80, {b"a": 1.0, b"b": 1.0})
    assert abs(order.count(b"a") - order.count(b"b")) <= 2
    assert len(set(world.turns())) == 4  # and all of its runs get on


def test_a_client_with_long_turns_gets_no_more_time_than_one_with_short_ones():
    world = World()
    runs = [world.open_ready(peer=peer) for peer in (b"a", b"a", b"b", b"b")]
    order = turns_by_client(world, runs, 200, {b"a": 4.0, b"b": 1.0})
    had = {peer: order.count(peer) * seconds for peer, seconds in ((b"a", 4.0), (b"b", 1.0))}
    assert had[b"a"] / had[b"b"] < 1.1


def test_a_step_of_priority_is_worth_twice_the_time():
    world = World()
    runs = [world.open_ready(peer=b"a", priority=1) for _ in range(2)]
    runs += [world.open_ready(peer=b"b") for _ in range(2)]
    order = turns_by_client(world, runs, 300, {b"a": 1.0, b"b": 1.0})
    assert 1.9 < order.count(b"a") / order.count(b"b") < 2.1


def test_who_comes_back_is_owed_nothing():
    world = World()
    a, b = world.open_ready(peer=b"a"), world.open_ready(peer=b"b")
    turns_by_client(world, [a], 50, {b"a": 1.0})  # alone for long
    order = []
    world.denoise(b)
    for _ in range(20):
        run = a if world.turns()[-1] == a.id else b
        order.append(run.peer)
        world.now += 1.0
        world.finish_turn(world.group(a))
        world.denoise(run)
    assert 9 <= order.count(b"b") <= 11
    assert b"bbb" not in b"".join(order)


def test_status_tells_how_many_are_before_each_that_waits():
    world = World(places=2)
    a, b = world.open_ready(peer=b"a"), world.open_ready(peer=b"b")
    c = world.open(peer=b"c")
    world.denoise(a)
    world.denoise(b)  # a is in its turn: b is next
    assert world.core.tidings.positions(world.now) == {b.id: 0, c.id: 0}
    d = world.open(peer=b"d")
    assert world.core.tidings.positions(world.now)[d.id] == 1


def test_nothing_of_a_client_or_a_group_is_left_in_the_books():
    world = World()
    run = world.open_ready(peer=b"a")
    group = world.group(run)
    world.denoise(run)
    world.finish_turn(group)
    world.core.client_gone(b"a", (), world.now)
    assert world.core.turns.queues[group.name].had == {}
    world.core.unload([group], False, world.now)
    world.leave(group)
    assert world.core.turns.queues == {}
