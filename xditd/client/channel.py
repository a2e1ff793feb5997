"""A channel: the descriptors of one connection, ZeroMQ's and a lane's among them.

It knows no messages, no requests and no lock.

Its owner calls everything but `poll` and `poll_messages` with a lock held. ZeroMQ's descriptor is edge-triggered:
any call may swallow the edge that announced a message. So whoever touched the socket leaves a note that there may be
something to read; `receive` follows it, and `poll` does not wait while there is one.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from xditd.handoff.lane import Lane
from xditd.handoff.lease import Lease
from xditd.protocol import codec
from xditd.protocol.endpoints import Endpoint
from xditd.protocol.errors import Code, XditError

_LINGER = 100
"""Milliseconds that a last cancel may take to leave after `close`."""


class Channel:
    """A ZeroMQ DEALER, and what tells that the other end is gone: the lease, or without one ZeroMQ's own monitor.

    Args:
        context: of the socket.
        endpoint: to connect to. ZeroMQ connects in the background, and for ever.
        lease: watched, not owned; None where there is no shared memory.

    Raises:
        XditError: `bad_value` for an address that can not be.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: Endpoint, lease: Lease | None) -> None:
        self._lease = lease
        self._lane: Lane | None = None
        self._look_at_socket = self._look_at_lane = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_wake = weakref.finalize(self, os.close, self._wake)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_FRAME)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        if endpoint.path is None:
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
            self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20000)
        self._monitor: zmq.Socket[bytes] | None = None
        if lease is None:
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._lane_fd = -1
        self._socket_fd = int(self._socket.getsockopt(zmq.FD))
        self._lease_fd = -1 if lease is None else lease.fileno()
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._socket_fd, select.POLLIN)
        if self._monitor is not None:
            self._poll.register(int(self._monitor.getsockopt(zmq.FD)), select.POLLIN)
        if lease is not None:
            self._poll.register(self._lease_fd, select.POLLRDHUP)
        try:
            self._socket.connect(endpoint.address)
        except zmq.ZMQError as error:
            self.close()
            raise XditError(Code.BAD_VALUE, f"{endpoint} is no endpoint: {error.strerror}.") from error

    def take(self, lane: Lane) -> None:
        """Uses a lane from now on, for messages that are sent by it and for their answers."""
        self._lane = lane
        self._lane_fd = lane.fileno()
        self._poll.register(self._lane_fd, select.POLLIN)

    def send_by_lane(self, header: bytes) -> bool:
        """Sends a message by the lane. False where there is none, or no room on it."""
        return self._lane is not None and self._lane.send(header)

    def send(self, header: bytes, frames: Sequence[Any] = ()) -> None:
        """Sends a message by ZeroMQ, at once; frames are not copied and must stay as they are.

        Raises:
            XditError: `timeout` where the other end takes no more.
        """
        try:
            if frames:
                self._socket.send_multipart([header, *frames], zmq.NOBLOCK, copy=False)
            else:
                self._socket.send(header, zmq.NOBLOCK)
        except zmq.Again:
            raise XditError(Code.TIMEOUT, "The daemon takes no more messages; it may hang.") from None
        finally:
            self._look_at_socket = True

    def look(self) -> None:
        """Has `receive` look for what nobody has seen come."""
        self._look_at_socket = self._look_at_lane = True

    def receive(self) -> tuple[bytes, list[Any]] | None:
        """The next message that has come: its header and its frames; or None."""
        if self._look_at_lane:
            said = self._lane.receive() if self._lane is not None else None
            if said:
                return said, []
            self._look_at_lane = False
            if said is not None:  # the daemon has closed it: it ends, or ends this connection
                self._close_lane()
        if not self._look_at_socket:
            return None
        socket = self._socket
        self._look_at_socket = False  # before the look: a note that `poll` leaves meanwhile must not be lost
        if not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        self._look_at_socket = True
        header = socket.recv(zmq.NOBLOCK)
        frames: list[Any] = []
        while socket.getsockopt(zmq.RCVMORE):
            frames.append(socket.recv(zmq.NOBLOCK, copy=False))
        return header, frames

    @property
    def hung_up(self) -> bool:
        """Whether the other end is gone. Messages that it sent before may still wait."""
        if self._lease is not None:
            return self._lease.gone
        assert self._monitor is not None
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                return True
        return False

    def poll(self, timeout: float | None) -> tuple[bool, bool]:
        """Waits for a message, a hang-up or a wake-up. For one thread at a time, without the lock.

        Args:
            timeout: seconds; None waits without end.

        Returns:
            Whether it was woken, and whether `hung_up` should be looked at.
        """
        if self._look_at_socket or self._look_at_lane:
            return False, False
        woken = watched = False
        for fd, _ in self._poll.poll(None if timeout is None else timeout * 1000):
            if fd == self._lane_fd:
                self._look_at_lane = True
            elif fd == self._socket_fd:
                self._look_at_socket = True
                watched = watched or self._lease is None
            elif fd == self._wake:
                woken = True
            else:  # the lease, or without one ZeroMQ's monitor
                watched = True
        return woken, watched

    def poll_messages(self, timeout: float) -> None:
        """Waits for a message alone, where the hang-up is known."""
        poll = select.poll()
        poll.register(self._socket_fd, select.POLLIN)
        poll.poll(timeout * 1000)
        self._look_at_socket = True

    def wake(self) -> None:
        """Ends a `poll` in another thread, this one or the next."""
        os.eventfd_write(self._wake, 1)

    def calm(self) -> None:
        """Takes back what `wake` left."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def close(self) -> None:
        """Closes all but the lease. Not while another thread polls."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._socket.close()
        self._close_lane()
        self._close_wake()

    def _close_lane(self) -> None:
        if self._lane is not None:
            self._poll.unregister(self._lane_fd)
            self._lane.close()
            self._lane, self._lane_fd = None, -1
