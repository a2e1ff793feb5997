"""Orders are done in the order in which the daemon gave them, though they come by two ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq

from xditd.handoff.lane import Lane, pair
from xditd.protocol import orders
from xditd.protocol.codec import encode
from xditd.rank.inbox import Inbox


@dataclass
class Daemon:
    """What a daemon does when it gives orders; each is the forgetting of a run, so that numbers tell them apart."""

    socket: zmq.Socket
    lane: Lane
    sent: int = 0

    def by_zeromq(self, run: int) -> None:
        self.socket.send(encode(orders.ForgetRun(run=run)))
        self.sent += 1

    def by_lane(self, run: int) -> bool:
        return self.lane.send(orders.AFTER.pack(self.sent) + encode(orders.ForgetRun(run=run)))


@pytest.fixture
def ends() -> Iterator[tuple[Daemon, Inbox]]:
    context = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://orders")
    theirs.connect("inproc://orders")
    lane, fd = pair()
    yield Daemon(ours, lane), Inbox(theirs, Lane(fd))
    context.destroy(linger=0)
    lane.close()


def taken(inbox: Inbox, count: int) -> list[int]:
    return [inbox.next()[0].run for _ in range(count)]


def test_an_order_by_the_lane_waits_for_those_by_zeromq_before_it(ends: tuple[Daemon, Inbox]) -> None:
    daemon, inbox = ends
    daemon.by_zeromq(1)
    daemon.by_zeromq(2)
    daemon.by_lane(3)
    assert taken(inbox, 3) == [1, 2, 3]


def test_an_order_by_zeromq_does_not_overtake_those_in_the_lane(ends: tuple[Daemon, Inbox]) -> None:
    daemon, inbox = ends
    daemon.by_lane(1)
    daemon.by_lane(2)
    daemon.by_zeromq(3)
    daemon.by_lane(4)
    daemon.by_zeromq(5)
    assert taken(inbox, 5) == [1, 2, 3, 4, 5]


def test_what_finds_no_room_in_the_lane_keeps_its_place(ends: tuple[Daemon, Inbox]) -> None:
    daemon, inbox = ends
    given, full = 0, False
    while not full:
        given += 1
        full = not daemon.by_lane(given)
    daemon.by_zeromq(given)
    daemon.by_zeromq(given + 1)
    assert taken(inbox, given + 1) == list(range(1, given + 2))


def test_frames_come_with_their_order(ends: tuple[Daemon, Inbox]) -> None:
    daemon, inbox = ends
    daemon.socket.send_multipart([encode(orders.ForgetRun(run=1)), b"frame"])
    order, frames = inbox.next()
    assert (order.run, [bytes(frame.buffer) for frame in frames]) == (1, [b"frame"])


def test_orders_come_by_zeromq_alone_where_the_lane_has_ended(ends: tuple[Daemon, Inbox]) -> None:
    daemon, inbox = ends
    daemon.lane.close()
    daemon.by_zeromq(1)
    daemon.by_zeromq(2)
    assert taken(inbox, 2) == [1, 2]
