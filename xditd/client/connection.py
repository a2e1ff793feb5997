"""A connection to one life of a daemon: sends requests, and hands answers to the threads that wait for them.

No thread of its own. One lock is around everything that touches the ZeroMQ socket, and nobody waits inside it:
of the threads that wait, one is the *reader*. It polls the descriptors without the lock, then takes it, reads all
that came and wakes the others; when it has its own answer, another takes its place. Whoever sends reads as well,
since ZeroMQ's descriptor is edge-triggered, and wakes the reader if the reader's own answer was among it.

It knows no runs and no tensors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec import Struct

from xditd.client.channel import Channel
from xditd.client.request import Request, Tensors, anew
from xditd.handoff.arena import Arena
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol.endpoints import Endpoint
from xditd.protocol.errors import Code, XditError

log = logging.getLogger(__name__)

Hear = Callable[[Any, "list[Any]"], None]

TICK = 0.02
"""Seconds between two looks at whether a wait is to be interrupted."""

BY_LANE = (m.PutConditioning, m.Denoise, m.Decode, m.Encode, m.EncodeText)
"""Requests that take the lane: those of a step, with one answer and hardly an event. Of one run they must not overtake
each other, so all of them do."""

_LAST_WORDS = 0.05
"""Seconds that answers may still take to come out of ZeroMQ when the daemon's end of file is there already."""


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
        self._channel = Channel(context, endpoint, None if arena is None else arena.lease)

    def open(self, name: str, timeout: float, interrupt: Callable[[], None] | None = None) -> None:
        """Says hello.

        Raises:
            XditError: `unsupported_version`, `not_permitted`; `timeout` and `daemon_lost` where nobody answers.
        """
        token = self.arena.lease.token if self.arena is not None else ""
        fields = {"versions": m.VERSIONS, "client": name, "pid": os.getpid(), "token": token}
        self.welcome, _ = self.ask(m.Hello, fields, timeout=timeout, interrupt=interrupt)
        if self.arena is not None and "lane" in self.welcome.capabilities:
            try:
                self._channel.take(self.arena.lease.open_lane())
            except XditError as error:
                if error.code != Code.ARENA_EXHAUSTED:
                    raise
                log.info("Steps go by ZeroMQ: %s", error.message)  # the daemon has no descriptors left

    @property
    def alive(self) -> bool:
        """Whether it can be used; looks for an end of file that nobody has seen yet."""
        with self._lock:
            if self.lost is None and self._channel.hung_up:
                self._channel.look()
                self._receive(None)
                self._lose(_daemon_lost())
            return self.lost is None

    def ask(
        self,
        kind: type[Struct],
        fields: dict[str, Any],
        parcel: Tensors | None = None,
        *,
        hear: Hear | None = None,
        interrupt: Callable[[], None] | None = None,
        timeout: float | None = None,
        late: Callable[[Any], None] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Sends a request and waits for its answer: `begin` and `finish`."""
        request = self.begin(kind, fields, parcel)
        return self.finish(request, hear=hear, interrupt=interrupt, timeout=timeout, late=late)

    def begin(self, kind: type[Struct], fields: dict[str, Any], parcel: Tensors | None = None) -> Request:
        """Sends a request, by the lane if it is one for it and there is room, else by ZeroMQ.

        Args:
            kind: of the request.
            fields: of the message, but for its id.
            parcel: its tensors; released if the request fails or is abandoned.

        Raises:
            XditError: `daemon_lost`; `too_large`; `timeout` where the daemon takes no more messages.
        """
        request = self._begin(kind, fields, parcel, kind in BY_LANE, True)
        assert request is not None
        return request

    def begin_by_lane(
        self, kind: type[Struct], fields: dict[str, Any], parcel: Tensors | None = None
    ) -> Request | None:
        """As `begin`, but by the lane alone; None where that cannot be: nothing was sent."""
        return self._begin(kind, fields, parcel, True, False) if kind in BY_LANE else None

    def _begin(
        self, kind: type[Struct], fields: dict[str, Any], parcel: Tensors | None, lane: bool, zeromq: bool
    ) -> Request | None:
        with self._lock:
            if self.lost is not None:
                _release(parcel)
                raise anew(self.lost)
            # Inside the lock: the daemon takes an id that is not above the last one for a duplicate.
            self._last_id += 1
            request = Request(self._last_id, kind, parcel)
            try:
                header = codec.encode(kind(id=request.id, **fields))
                frames = parcel.frames if parcel is not None else ()
                request.by_lane = lane and not frames and self._channel.send_by_lane(header)
                if not request.by_lane:
                    if not zeromq:
                        return None
                    self._channel.send(header, frames)
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
            self._channel.look()
            self._receive(request)
            return len(request.events)

    def say_goodbye(self) -> None:
        """Tells the daemon that this connection is about to end, where the end of a lease does not; waits for nothing."""
        if self.arena is None and "goodbye" in self.welcome.capabilities:
            with contextlib.suppress(XditError):  # it takes no more messages, and will notice by itself
                self.tell(m.Goodbye, {})

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
                        self._channel.look()
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
        woken, watched = self._channel.poll(timeout)
        with self._lock:
            if woken:
                self._channel.calm()
            if self.lost is not None:
                return
            self._receive(request, reading=True)
            hung_up = watched and self.lost is None and self._channel.hung_up
        if hung_up:
            self._hear_last_words(request)

    def _hear_last_words(self, request: Request) -> None:
        """The daemon's end of file overtakes what it said before through ZeroMQ: waits a moment for that."""
        end = time.monotonic() + _LAST_WORDS
        while (left := end - time.monotonic()) > 0:
            with self._lock:
                if self.lost is not None:
                    return
                self._channel.look()
                self._receive(request)
                if all(waiting.abandoned for waiting in self._requests.values()):
                    break
            self._channel.poll_messages(left)
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

    def _receive(self, me: Request | None, *, reading: bool = False) -> None:
        """Reads and hands out all that has come. `me` is the request of the thread that calls.

        The reader stops at its own answer: the channel knows that there may be more, and does not let the next wait.
        """
        while self.lost is None:
            message = self._channel.receive()
            if message is None:
                return
            self._dispatch(*message, me)
            if reading and me is not None and me.answer is not None:
                return

    def _dispatch(self, header: bytes, frames: list[Any], me: Request | None) -> None:
        try:
            message = codec.decode(header, m.Reply, m.REPLIES, trusted=True)
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
        if isinstance(message, (m.Queued, m.Progress, m.Rebound, m.Happened)):
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
            self._channel.wake()
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
            self._channel.wake()  # the reader disposes of what it polls when it steps down

    def _dispose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        if self.arena is not None:
            self.arena.close()


def _release(parcel: Tensors | None) -> None:
    if parcel is not None:
        parcel.release()


def _daemon_lost() -> XditError:
    return XditError(
        Code.DAEMON_LOST,
        "The daemon ended or was restarted while this was under way; ask again, in a new run.",
    )
