"""A disk may be slow: what has changed while a model's file was read counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.daemon.world import REF, World
from xditd.catalog.catalog import Found
from xditd.daemon.chronicle import Chronicle
from xditd.daemon.devices import Device
from xditd.daemon.requests import Requests
from xditd.daemon.sight import Sight
from xditd.protocol import messages as m

Meanwhile = Callable[[World, SimpleNamespace], None]


def drained(world: World, session: SimpleNamespace) -> None:
    world.core.draining = True


def gone(world: World, session: SimpleNamespace) -> None:
    session.alive = False
    world.core.client_gone(session.peer, (), world.now)


def stopped(world: World, session: SimpleNamespace) -> None:
    world.core.close(world.now)


def nothing(world: World, session: SimpleNamespace) -> None:
    """The disk is slow, and that is all."""


def after_a_slow_disk(request: m.Load | m.OpenRun, meanwhile: Meanwhile) -> World:
    """A client's request, whose file is there when something else has happened."""
    world = World()
    read, may_read = threading.Event(), threading.Event()

    def find(ref: m.ModelRef) -> Found:
        read.set()
        assert may_read.wait(10)
        return world.what(ref)[0]

    async def story() -> None:
        devices = [Device(name, "CPU") for name in world.devices]
        sight = Sight(Chronicle(world.answer, lambda: 0.0), None)
        catalog = SimpleNamespace(find=find)
        requests = Requests(world, world.core, catalog, devices, sight=sight, stop=lambda: None)
        session = SimpleNamespace(peer=b"ctl", name="ctl", alive=True)
        requests.handle(session, request, ())
        await asyncio.to_thread(read.wait, 10)
        meanwhile(world, session)
        may_read.set()
        await asyncio.gather(*requests._tasks)

    asyncio.run(asyncio.wait_for(story(), 30))
    return world


ASKED = pytest.mark.parametrize(
    "request_", [m.Load(id=7, model=REF), m.OpenRun(id=7, model=REF)], ids=["load", "open_run"]
)


@ASKED
@pytest.mark.parametrize(
    ("meanwhile", "codes"), [(drained, ["draining"]), (stopped, ["draining"]), (gone, [])]
)
def test_nothing_starts_for_who_has_left_or_when_the_daemon_takes_nothing_new(
    request_: m.Load | m.OpenRun, meanwhile: Meanwhile, codes: list[str]
) -> None:
    world = after_a_slow_disk(request_, meanwhile)
    assert [answer.code for _, answer in world.answers] == codes
    assert (world.started, dict(world.core.fleet.groups), world.core.fleet.loads.waiting) == ([], {}, [])


@ASKED
def test_a_slow_disk_alone_keeps_nobody_from_it(request_: m.Load | m.OpenRun) -> None:
    (group,) = after_a_slow_disk(request_, nothing).started
    assert group.ref == REF


def test_two_who_drain_are_answered_when_the_last_run_has_ended_and_the_daemon_stops_once() -> None:
    world, stops = World(), []
    sight = Sight(Chronicle(world.answer, lambda: 0.0), None)
    requests = Requests(
        world, world.core, None, [], sight=sight, stop=lambda: stops.append(len(world.answers))
    )
    session = SimpleNamespace(peer=b"ctl", name="ctl", alive=True)
    run = world.open_ready()
    for number in (71, 72):
        requests.handle(session, m.Drain(id=number, stop=True), ())
    assert (world.of(71), world.of(72), stops) == ([], [], [])
    requests.handle(SimpleNamespace(peer=run.peer, name="a"), m.Close(id=73, run=run.id), ())
    assert [reply.re for _, reply in world.answers[-3:]] == [73, 71, 72]
    assert stops == [len(world.answers)], "a second stop would be in a hurry, as a second signal is"
