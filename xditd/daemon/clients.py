"""The door for clients: bytes in, requests out; replies in, bytes out; and who is connected.

A message is decoded or refused; Hello makes a session; everything else goes to `requests`. A client's end is the
end of file of its lease; one without shared memory says goodbye, or is forgotten when it holds nothing and is quiet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from msgspec import Struct

from xditd import __version__
from xditd.daemon.arenas import Arena, Arenas
from xditd.daemon.config import Config
from xditd.daemon.metrics import Metrics
from xditd.daemon.session import Session
from xditd.daemon.wire import Wire
from xditd.daemon.work import failed, spell
from xditd.handoff.lane import Lane
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol.endpoints import Endpoint
from xditd.protocol.errors import Code, XditError

log = logging.getLogger("xditd.clients")

CAPABILITIES = (
    "flux", "sd3", "pixart", "hunyuandit", "sdxl", "autoencoder_kl", "clip", "t5", "bert", "ulysses", "ring", "cfg", "sample",
    "encode_text", "frames", "shared_memory", "lane", "watch", "replicas", "free_memory", "goodbye", "lora", "sleep", "patch", "tile",
    "tensor", "pipefusion", "offload", "shard", "weight_dtype", "fallback", "explain",
)  # fmt: skip
"""What a client may count on, beyond the protocol's version."""

OURSELVES = b"xditd"
"""The peer in whose name the daemon asks for things itself, to preload; no ZeroMQ identity is it."""

_DOOR = {False: "new clients have to wait", True: "new clients are taken again"}

Handle = Callable[[Session, Any, Sequence[Any]], None]
"""Called with (session, request, frames); raises XditError to refuse."""

Answered = Callable[[Struct], None]
"""Called with replies and events for the daemon itself."""

Noticed = Callable[[Session, str], None]
"""Called with (session, "connected" or "gone")."""

Gone = Callable[[bytes, "tuple[int, ...]"], None]
"""Called with (peer, its segments) when a session has ended."""


class Clients:
    """All sessions, by ZeroMQ identity."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: Endpoint,
        config: Config,
        *,
        handle: Handle,
        gone: Gone,
        answered: Answered,
        noticed: Noticed,
        metrics: Metrics | None = None,
    ) -> None:
        """
        Raises:
            zmq.ZMQError: the endpoint cannot be bound.
        """
        self.config = config
        self.handle = handle
        self.gone = gone
        self.answered = answered
        self.noticed = noticed
        self.metrics = metrics
        self.epoch = os.urandom(8).hex()
        self.sessions: dict[bytes, Session] = {}
        self.arenas: Arenas | None = None  # clients on other machines send frames
        if endpoint.arena is not None:
            self.arenas = Arenas(
                endpoint.arena,
                per_client_bytes=config.arena.per_client_bytes,
                total_bytes=config.arena.total_bytes,
                first_bytes=config.arena.first_bytes,
                on_gone=self._lease_ended,
                on_lane=self._lane_opened,
            )
        self._wire = Wire(
            context,
            endpoint.address,
            self._receive,
            MAXMSGSIZE=codec.MAX_FRAME,
            HEARTBEAT_IVL=5000,
            HEARTBEAT_TIMEOUT=20000,
            HANDSHAKE_IVL=5000,
        )

    async def start(self) -> None:
        """Opens the arena socket."""
        if self.arenas is not None:
            await self.arenas.start()

    async def close(self) -> None:
        self._wire.close()
        if self.arenas is not None:
            await self.arenas.close()

    def answer(self, peer: bytes, reply: Struct, frames: Sequence[Any] = ()) -> None:
        """Sends a reply or an event. A client that takes no more of them is disconnected."""
        if peer == OURSELVES:
            self.answered(reply)
            return
        if self.metrics is not None:
            self.metrics.answered(reply)
        session, header = self.sessions.get(peer), codec.encode(reply)
        if session is not None and not frames and session.answer_by_lane(reply, header):
            return
        if not self._wire.send(peer, header, frames) and session is not None:
            # Soon, not now: who answers is in the middle of deciding about the runs that would end here.
            why = "gone, or too slow to take its answers"
            asyncio.get_running_loop().call_soon(self._disconnect, session, why)

    def forget_quiet(self, holding: set[bytes], now: float) -> None:
        """Forgets clients without a lease that hold no run and have been quiet: they leave no end of file.

        One that was killed could say no goodbye, and an older one does not know how.
        """
        limit = self.config.deadlines.run_idle
        for session in list(self.sessions.values()):
            if session.arena is None and session.peer not in holding and now - session.heard > limit:
                self._disconnect(session, "forgotten: it was quiet")

    def watch_descriptors(self) -> None:
        """Takes no connections while few file descriptors are left: libzmq aborts the process when there are none."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/proc/self/fd"))
        wanted = used < limit * (0.7 if not self._wire.listening else 0.8)
        if wanted != self._wire.listening:
            log.warning("%d of %d file descriptors are in use: %s.", used, limit, _DOOR[wanted])
            self._wire.listen(wanted)

    def _receive(
        self, peer: bytes, header: bytes, frames: Sequence[zmq.Frame], *, by_lane: bool = False
    ) -> None:
        request: int | None = None
        try:
            if len(frames) > codec.MAX_FRAMES:
                raise XditError(
                    Code.TOO_LARGE, f"A message has {len(frames)} frames; at most {codec.MAX_FRAMES}."
                )
            message = codec.decode(header, m.Request, m.REQUESTS)
            request = message.id
            session = self.sessions.get(peer)
            if session is None:
                self._hello(peer, message)
            elif session.is_new(message.id, by_lane=by_lane):
                session.heard = time.monotonic()
                session.check(message, [frame.buffer.nbytes for frame in frames])
                if self.metrics is not None:
                    self.metrics.asked(message)
                if isinstance(message, m.Goodbye):
                    self.answer(peer, m.Farewell(re=message.id))
                    self._disconnect(session, "said goodbye")
                else:
                    self.handle(session, message, frames)
            else:
                log.warning(
                    "Request %d came twice and is ignored.", message.id, extra={"client": session.name}
                )
        except XditError as error:
            named = error.details.pop("id", request)
            reply = m.Failed(re=named, code=spell(error.code), message=error.message, details=error.details)
            self.answer(peer, reply)
        except Exception:
            log.exception("A request failed.")
            self.answer(
                peer, failed(request, Code.INTERNAL, "The daemon failed at this; its log has the traceback.")
            )

    def _hello(self, peer: bytes, hello: Any) -> None:
        if not isinstance(hello, m.Hello):
            raise XditError(
                Code.HELLO_REQUIRED,
                "The daemon does not know this connection: it was restarted, or hello was not said. Connect anew.",
            )
        oldest, newest = hello.versions
        version = min(newest, m.VERSIONS[1])
        if version < max(oldest, m.VERSIONS[0]):
            raise XditError(
                Code.UNSUPPORTED_VERSION,
                f"The client speaks protocol {oldest} to {newest}, this daemon ({__version__}) {m.VERSIONS[0]} to "
                f"{m.VERSIONS[1]}; update the older of the two.",
                oldest=m.VERSIONS[0],
                newest=m.VERSIONS[1],
            )
        limits = self.config.limits
        if len(self.sessions) >= limits.clients:
            raise XditError(Code.QUEUE_FULL, f"{limits.clients} clients are connected, which is the limit.")
        arena = self._claim(hello.token) if hello.token else None
        pid = arena.pid if arena is not None else hello.pid
        session = Session(peer, hello.client or f"pid {pid}", pid, arena, hello.id, time.monotonic())
        self.sessions[peer] = session
        how = "" if arena is not None else " without shared memory"
        log.info("Connected%s.", how, extra={"client": session.name, "pid": pid})
        welcome = m.Welcome(
            re=hello.id,
            version=version,
            daemon=__version__,
            epoch=self.epoch,
            capabilities=CAPABILITIES,
            limits=m.Limits(
                header_bytes=codec.MAX_HEADER,
                frames=codec.MAX_FRAMES,
                frame_bytes=codec.MAX_FRAME,
                arena_bytes=self.config.arena.per_client_bytes,
                runs=limits.runs_per_client,
                queue=limits.queue,
            ),
        )
        self.answer(peer, welcome)
        self.noticed(session, "connected")

    def _claim(self, token: str) -> Arena:
        if self.arenas is None:
            raise XditError(
                Code.NOT_PERMITTED, "This endpoint has no shared memory: say hello without a token."
            )
        return self.arenas.claim(token)

    def _lease_ended(self, token: str) -> None:
        session = self._session_of(token)
        if session is not None:
            self._disconnect(session, "disconnected")

    def _lane_opened(self, token: str, lane: Lane) -> None:
        session = self._session_of(token)
        if session is None:
            lane.close()
            return
        session.lane = lane
        asyncio.get_running_loop().add_reader(lane.fileno(), self._hear, session, lane)

    def _hear(self, session: Session, lane: Lane) -> None:
        """A request has come by the lane, or the client has closed its end of it."""
        header = lane.receive()
        if header:
            self._receive(session.peer, header, (), by_lane=True)
        elif header is not None:
            self._close_lane(session)

    def _close_lane(self, session: Session) -> None:
        if session.lane is not None:
            asyncio.get_running_loop().remove_reader(session.lane.fileno())
            session.lane.close()
            session.lane = None

    def _session_of(self, token: str) -> Session | None:
        sessions = self.sessions.values()
        return next((s for s in sessions if s.arena is not None and s.arena.token == token), None)

    def _disconnect(self, session: Session, how: str) -> None:
        if self.sessions.pop(session.peer, None) is None:
            return
        session.alive = False
        self._close_lane(session)
        log.info("%s.", how.capitalize(), extra={"client": session.name, "pid": session.pid})
        arena = session.arena
        self.noticed(session, "gone")
        self.gone(session.peer, tuple(arena.segments) if arena is not None else ())
        if arena is not None and self.arenas is not None:
            self.arenas.release(arena.token)
