"""A connection to one life of a daemon: sends requests, and hands answers to the threads that wait for them.

No thread of its own. One lock is around everything that touches the ZeroMQ socket, and nobody waits inside it:
of the threads that wait, one is the *reader*. It polls the descriptors without the lock, then takes it, reads all
that came and wakes the others; when it has its own answer, another takes its place.

ZeroMQ's descriptor is edge-triggered: any call may swallow the edge that announced a message. So whoever held the
lock and touched the socket leaves it drained, and wakes the reader if the reader's own answer was among it.

It knows no runs and no tensors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import zmq
from msgspec import Struct
from zmq.utils.monitor import recv_monitor_message

from xditd.client.parcel import Parcel
from xditd.client.request import Request, anew
from xditd.handoff.arena import Arena
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol.endpoints import Endpoint
from xditd.protocol.errors import Code, XditError

log = logging.getLogger(__name__)

Hear = Callable[[Any, "list[Any]"], None]

TICK = 0.02
"""Seconds between two looks at whether a wait is to be interrupted."""

_LAST_WORDS = 0.05
"""Seconds that answers may still take to come out of ZeroMQ when the daemon's end of file is there already."""

_LINGER = 100
"""Milliseconds that a last cancel may take to leave after `close`."""


class Connection:
    """One connection. `open` it before anything else.

    Attributes:
        endpoint: where it goes.
        arena: the shared memory; None where tensors travel as frames.
        welcome: the daemon's answer to Hello.
        lost: why it is over; None while it lives.
        listeners: by run, who is called with its `RunEnded`; in any thread, with the lock held.
    """

    welcome: m.Welcome

    def __init__(self, context: zmq.Context[Any], endpoint: Endpoint, arena: Arena | None) -> None:
        """
        Args:
            arena: taken over.
        """
        self.endpoint = endpoint
        self.arena = arena
        self.lost: XditError | None = None
        self.listeners: dict[int, Callable[[m.RunEnded], None]] = {}
        self._lock = threading.RLock()
        self._requests: dict[int, Request] = {}
        self._last_id = 0
        self._reader: Request | None = None
        self._followers: list[Request] = []
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_wake = weakref.finalize(self, os.close, self._wake)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] | None = None
        self._socket.setsockopt(zmq.LINGER, _LINGER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_FRAME)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        if endpoint.path is None:
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
            self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20000)
        if arena is None:
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._socket_fd = int(self._socket.getsockopt(zmq.FD))
        self._poll.register(self._socket_fd, select.POLLIN)
        if self._monitor is not None:
            self._poll.register(int(self._monitor.getsockopt(zmq.FD)), select.POLLIN)
        self._lease_fd = -1 if arena is None else arena.lease.fileno()
        if arena is not None:
            self._poll.register(self._lease_fd, select.POLLRDHUP)
        self._socket.connect(endpoint.address)

    def open(self, name: str, timeout: float, interrupt: Callable[[], None] | None = None) -> None:
        """Says hello.

        Raises:
            XditError: `unsupported_version`, `not_permitted`; `timeout` and `daemon_lost` where nobody answers.
        """
        token = self.arena.lease.token if self.arena is not None else ""
        fields = {"versions": m.VERSIONS, "client": name, "pid": os.getpid(), "token": token}
        self.welcome, _ = self.ask(m.Hello, fields, timeout=timeout, interrupt=interrupt)

    @property
    def alive(self) -> bool:
        """Whether it can be used; looks for an end of file that nobody has seen yet."""
        with self._lock:
            if self.lost is None:
                if self.arena is not None:
                    if self.arena.lease.gone:
                        self._receive(None)
                        self._lose(_daemon_lost())
                else:
                    self._receive(None)
            return self.lost is None

    def ask(
        self,
        kind: type[Struct],
        fields: dict[str, Any],
        parcel: Parcel | None = None,
        *,
        hear: Hear | None = None,
        interrupt: Callable[[], None] | None = None,
        timeout: float | None = None,
        late: Callable[[Any], None] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Sends a request and waits for its answer: `begin` and `finish`."""
        request = self.begin(kind, fields, parcel)
        return self.finish(request, hear=hear, interrupt=interrupt, timeout=timeout, late=late)

    def begin(self, kind: type[Struct], fields: dict[str, Any], parcel: Parcel | None = None) -> Request:
        """Sends a request.

        Args:
            kind: of the request.
            fields: of the message, but for its id.
            parcel: its tensors; released if the request fails or is abandoned.

        Raises:
            XditError: `daemon_lost`; `too_large`; `timeout` where the daemon takes no more messages.
        """
        with self._lock:
            if self.lost is not None:
                _release(parcel)
                raise anew(self.lost)
            self._last_id += (
                1  # inside the lock: the daemon takes an id that is not above the last for a duplicate
            )
            request = Request(self._last_id, kind, parcel)
            try:
                header = codec.encode(kind(id=request.id, **fields))
                if parcel is not None and parcel.frames:
                    self._socket.send_multipart([header, *parcel.frames], zmq.NOBLOCK, copy=False)
                else:
                    self._socket.send(header, zmq.NOBLOCK)
            except zmq.Again:
                _release(parcel)
                raise XditError(Code.TIMEOUT, "The daemon takes no more messages; it may hang.") from None
            except BaseException:
                _release(parcel)
                raise
            self._requests[request.id] = request
            self._receive(request)
            return request

    def finish(
        self,
        request: Request,
        *,
        hear: Hear | None = None,
        interrupt: Callable[[], None] | None = None,
        timeout: float | None = None,
        late: Callable[[Any], None] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Waits for the answer of a request.

        Args:
            hear: called in this thread with each event and its frames, in order.
            interrupt: called every 20 ms; what it raises abandons the request.
            timeout: seconds; None waits for as long as the daemon lives.
            late: called, with the lock held, with the answer of an abandoned request when it comes.

        Returns:
            The answer and its frames. The parcel is the caller's to release.

        Raises:
            XditError: of the daemon; `daemon_lost`; `timeout`.
            BaseException: what `hear` or `interrupt` raised. The request is abandoned: its parcel is kept until its
                answer has come.
        """
        try:
            self._await(request, hear, interrupt, timeout)
        except BaseException:
            self.abandon(request, late)
            raise
        finally:
            self._step_down(request)
        try:
            return request.result()
        except XditError:
            _release(request.parcel)
            raise

    def abandon(self, request: Request, late: Callable[[Any], None] | None = None) -> None:
        """Leaves a request to its fate: its parcel is released and `late` called when its answer comes."""
        with self._lock:
            request.abandoned = True
            request.late = late
            request.events.clear()
            if request.answer is not None:
                self._settle(request)

    def tell(
        self, kind: type[Struct], fields: dict[str, Any], late: Callable[[Any], None] | None = None
    ) -> None:
        """Sends a request whose answer nobody waits for. Does nothing on a connection that is over."""
        with self._lock:
            if self.lost is None:
                self.abandon(self.begin(kind, fields), late)

    def behind(self, request: Request) -> int:
        """How many further events of a request have come."""
        with self._lock:
            self._receive(request)
            return len(request.events)

    def close(self, reason: XditError) -> None:
        """Ends the connection; whoever waits gets the reason."""
        with self._lock:
            self._lose(reason)

    # ------------------------------------------------------------------------------------------------- waiting

    def _await(
        self,
        request: Request,
        hear: Hear | None,
        interrupt: Callable[[], None] | None,
        timeout: float | None,
    ) -> None:
        now = time.monotonic() if timeout is not None or interrupt is not None else 0.0
        deadline = None if timeout is None else now + timeout
        tick = None if interrupt is None else now + TICK
        while True:
            left = None
            if deadline is not None or tick is not None:
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    with self._lock:
                        self._receive(request)
                        if request.answer is not None:
                            return
                    raise XditError(
                        Code.TIMEOUT,
                        f"The daemon did not answer {request.kind.__name__} within {timeout:.3g} s.",
                    )
                if interrupt is not None and tick is not None and now >= tick:
                    self._step_down(request)
                    interrupt()
                    tick = time.monotonic() + TICK
                left = max(0.0, min(t for t in (deadline, tick) if t is not None) - now)
            event = None
            with self._lock:
                if request.events:
                    event = request.events.popleft()
                elif request.answer is not None:
                    return
                elif self._reader is None or self._reader is request:
                    self._reader = request
                else:
                    self._follow(request, left)
                    continue
            if event is not None:
                self._step_down(request)
                if hear is not None:
                    hear(*event)
                continue
            self._read(request, left)

    def _follow(self, request: Request, timeout: float | None) -> None:
        """Waits to be woken: by the reader with an answer or event, or to become the reader."""
        if request.woken is None:
            request.woken = threading.Condition(self._lock)
        self._followers.append(request)
        try:
            request.woken.wait(timeout)
        finally:
            if request in self._followers:
                self._followers.remove(request)

    def _read(self, request: Request, timeout: float | None) -> None:
        """The reader's wait, outside of the lock, and what came of it, inside."""
        ready = self._poll.poll(None if timeout is None else timeout * 1000)
        fds = [fd for fd, _ in ready]
        with self._lock:
            if self._wake in fds:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if self.lost is not None:
                return
            self._receive(request)
        if self._lease_fd in fds:
            self._hear_last_words(request)

    def _hear_last_words(self, request: Request) -> None:
        """The daemon's end of file overtakes what it said before through ZeroMQ: waits a moment for that."""
        poll = select.poll()
        poll.register(self._socket_fd, select.POLLIN)
        end = time.monotonic() + _LAST_WORDS
        while (left := end - time.monotonic()) > 0:
            poll.poll(left * 1000)
            with self._lock:
                if self.lost is not None:
                    return
                self._receive(request)
                if all(r.abandoned for r in self._requests.values()):
                    break
        with self._lock:
            self._lose(_daemon_lost())

    def _step_down(self, request: Request) -> None:
        """Lets another thread read: if this one does, and also if it was woken to, but has its answer already."""
        with self._lock:
            if self._reader is request:
                self._reader = None
                if self.lost is not None:
                    self._dispose()
            if self._reader is None and self._followers:
                self._notify(self._followers[0])

    # ------------------------------------------------------------------------------- with the lock held, all below

    def _receive(self, me: Request | None) -> None:
        """Reads and hands out all that has come. `me` is the request of the thread that calls."""
        if self._monitor is not None and self.lost is None:
            while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                    self._drain(me)
                    self._lose(_daemon_lost())
                    return
        self._drain(me)

    def _drain(self, me: Request | None) -> None:
        socket = self._socket
        while self.lost is None and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            header = socket.recv(zmq.NOBLOCK)
            frames: list[Any] = []
            while socket.getsockopt(zmq.RCVMORE):
                frames.append(socket.recv(zmq.NOBLOCK, copy=False))
            self._dispatch(header, frames, me)

    def _dispatch(self, header: bytes, frames: list[Any], me: Request | None) -> None:
        try:
            message = codec.decode(header, m.Reply, m.REPLIES)
        except XditError as error:
            if error.code == Code.UNKNOWN_TYPE:
                log.warning("Ignored a message of a newer daemon: %s", error.message)
            else:
                self._lose(anew(error))
            return
        if isinstance(message, m.RunEnded):
            listener = self.listeners.get(message.run)
            if listener is not None:
                listener(message)
            return
        request = self._requests.get(message.re) if message.re is not None else None
        if isinstance(message, m.Failed) and message.code == Code.HELLO_REQUIRED.value:
            if request is not None:
                request.unheard = True
            self._lose(_daemon_lost())
            return
        if request is None:
            if isinstance(message, m.Failed):
                log.warning("The daemon refused a message: %s [%s]", message.message, message.code)
            return
        if isinstance(message, (m.Queued, m.Progress, m.Rebound)):
            if request.abandoned:
                return
            request.events.append((message, frames))
        else:
            del self._requests[request.id]
            request.answer = message
            request.frames = frames
            if request.abandoned:
                self._settle(request)
                return
        if request is not me:
            self._notify(request)

    def _settle(self, request: Request) -> None:
        """An abandoned request is answered: nobody touches its tensors any more."""
        _release(request.parcel)
        if request.late is not None:
            request.late(request.answer)

    def _notify(self, request: Request) -> None:
        if request is self._reader:
            os.eventfd_write(self._wake, 1)
        elif request in self._followers:
            assert request.woken is not None
            self._followers.remove(request)
            request.woken.notify()

    def _lose(self, reason: XditError) -> None:
        """The connection is over: every request fails with the reason."""
        if self.lost is not None:
            return
        self.lost = reason
        requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request.answer = reason
            if not request.abandoned:  # an abandoned one's slots went with the arena
                self._notify(request)
        if self._reader is None:
            self._dispose()
        else:
            os.eventfd_write(self._wake, 1)  # the reader disposes of what it polls when it steps down

    def _dispose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._socket.close()
        if self.arena is not None:
            self.arena.close()
        self._close_wake()


def _release(parcel: Parcel | None) -> None:
    if parcel is not None:
        parcel.release()


def _daemon_lost() -> XditError:
    return XditError(
        Code.DAEMON_LOST,
        "The daemon ended or was restarted while this was under way; ask again, in a new run.",
    )
