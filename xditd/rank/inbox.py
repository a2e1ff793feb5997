"""The orders of a rank, in the order in which the daemon gave them, whichever way they came. Knows no order's meaning.

An order without frames takes the lane, which is quicker, while that has room; it says how many orders by ZeroMQ it is
to come after. One by ZeroMQ comes after all that were in the lane when it was sent.
"""

from __future__ import annotations

from typing import Any

import zmq

from xditd.handoff.lane import Lane
from xditd.protocol import orders
from xditd.protocol.codec import decode


class Inbox:
    """Reads a rank's two ways.

    Args:
        socket: the DEALER that is connected to the daemon.
        lane: None where there is none.
    """

    def __init__(self, socket: zmq.Socket[bytes], lane: Lane | None) -> None:
        self._socket = socket
        self._lane = lane
        self._taken = 0  # orders, of those that came by ZeroMQ
        self._early: tuple[int, Any] | None = None  # an order, and how many by ZeroMQ it is to come after
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        if lane is not None:
            self._poller.register(lane.fileno(), zmq.POLLIN)

    def next(self) -> tuple[Any, list[Any]]:
        """Waits for the next order: it and its frames."""
        if self._early is None and self._lane is not None:
            self._poller.poll()
            self._look_at(self._lane)
        if self._early is not None and self._early[0] <= self._taken:
            order, self._early = self._early[1], None
            return order, []
        header, *frames = self._socket.recv_multipart(copy=False)
        self._taken += 1
        return _decode(header.buffer), frames

    def _look_at(self, lane: Lane) -> None:
        message = lane.receive()
        if message:
            (after,) = orders.AFTER.unpack_from(message)
            header = memoryview(message)[orders.AFTER.size :]
            self._early = after, _decode(header)
        elif message is not None:  # the daemon is gone: what kills this process is on its way
            self._poller.unregister(lane.fileno())
            self._lane = None


def _decode(header: memoryview) -> Any:
    return decode(header, orders.Order, orders.ORDERS, trusted=True)
