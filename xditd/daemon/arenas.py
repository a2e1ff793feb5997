"""Arenas: the shared memory of every client, from the daemon's side. It touches no tensor bytes and maps nothing.

Each connection to the arena socket is a lease: it opens with a token and a first segment, may grow and be given a
lane, and its end of file frees all of it. The server claims a lease when its token comes in a `Hello`, and passes
its segments to ranks. It knows no runs and no ZeroMQ.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import mmap
import os
import resource
import secrets
import socket
import struct
from collections.abc import Callable

from xditd.daemon.listener import Listener
from xditd.handoff import passing, records, segments
from xditd.handoff.lane import Lane, pair
from xditd.protocol.errors import Code, XditError

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Arena:
    """One client's shared memory.

    Attributes:
        token: the nonce that the client presents in `Hello`.
        pid, uid: of the process that connected, as the kernel tells.
        segments: bytes of each segment by its id; still readable when the lease has ended.
    """

    __slots__ = ("_fds", "_sock", "claimed", "growing", "has_lane", "pid", "segments", "token", "uid")

    def __init__(self, sock: socket.socket, pid: int, uid: int) -> None:
        self.token = secrets.token_hex(16)
        self.pid = pid
        self.uid = uid
        self.segments: dict[int, int] = {}
        self.claimed = False
        self.has_lane = False
        self.growing: asyncio.Task[None] | None = None
        self._fds: dict[int, int] = {}
        self._sock = sock

    def fd(self, segment_id: int) -> int:
        """The descriptor of a segment, to be passed on; it stays the arena's.

        Raises:
            XditError: `bad_slot` for a segment that this arena does not have, or no longer has.
        """
        try:
            return self._fds[segment_id]
        except KeyError:
            raise XditError(
                Code.BAD_SLOT, "The segment is not one of this client's, or the client is gone."
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of its segments."""
        return sum(self.segments.values())


class Arenas:
    """Every client's arena, under a budget for each and for all.

    Args:
        path: the arena socket. A stale one is replaced: see to it that no other daemon runs before `start`.
        per_client_bytes: at most, of one client.
        total_bytes: at most, of all clients.
        first_bytes: of the segment that a lease opens with, and the least that it grows by while its budget allows.
        on_gone: called with the token, exactly once, when a claimed lease ended by itself. Not for a lease that
            nobody claimed, nor after `release` or `close`.
        max_descriptors: at most, of all arenas: connections, segments and lanes; 0 is half of what the process may
            open.
        on_lane: called with the token and our end of its lane, which the callee closes; None gives no lanes.
    """

    def __init__(
        self,
        path: str,
        per_client_bytes: int,
        total_bytes: int,
        first_bytes: int,
        on_gone: Callable[[str], None],
        max_descriptors: int = 0,
        on_lane: Callable[[str, Lane], None] | None = None,
    ) -> None:
        self._per_client = per_client_bytes
        self._total = total_bytes
        self._first = _pages(first_bytes)
        self._on_gone = on_gone
        self._on_lane = on_lane
        self._max_descriptors = max_descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._ids = itertools.count(1)
        self._arenas: dict[str, Arena] = {}
        self._reserved = 0  # bytes of all segments, those being made too
        self._descriptors = 0
        self._listener = Listener(path, self._open, lambda sock: _refuse(sock, _no_descriptors()))

    async def start(self) -> None:
        """Listens. Clients may connect from here on.

        Raises:
            XditError: `bad_config` where the path can not be a socket.
        """
        self._listener.start()

    async def close(self) -> None:
        """Ends every lease and removes the socket. `on_gone` is not called."""
        self._listener.close()
        growing = [arena.growing for arena in self._arenas.values() if arena.growing is not None]
        for arena in list(self._arenas.values()):
            self._end(arena)
        await asyncio.gather(*growing, return_exceptions=True)

    def claim(self, token: str) -> Arena:
        """The arena of a token that came in a `Hello`; once.

        Raises:
            XditError: `not_permitted` for a token that is unknown or was claimed before.
        """
        arena = self._arenas.get(token)
        if arena is None or arena.claimed:
            raise XditError(
                Code.NOT_PERMITTED,
                "The token is none of a living client that has not said hello; connect to the arena socket anew.",
            )
        arena.claimed = True
        return arena

    def release(self, token: str) -> None:
        """Ends a lease from the daemon's side; nothing happens where it has ended already."""
        arena = self._arenas.get(token)
        if arena is not None:
            self._end(arena)

    @property
    def in_use_bytes(self) -> int:
        """Bytes of all clients' segments."""
        return self._reserved

    def list(self) -> list[Arena]:
        """The arenas that live now, claimed or not."""
        return list(self._arenas.values())

    # ------------------------------------------------------------------------------------------- connections

    def _open(self, sock: socket.socket) -> None:
        pid, uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if self._descriptors + 2 > self._max_descriptors:
            _refuse(sock, _no_descriptors())
            sock.close()
            return
        arena = Arena(sock, pid, uid)
        self._arenas[arena.token] = arena
        self._descriptors += 1
        arena.growing = asyncio.create_task(self._grow(arena, self._first))

    def _readable(self, arena: Arena) -> None:
        try:
            # recv: descriptors that a client sends are not taken
            raw = arena._sock.recv(records.MAX_RECORD + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            raw = b""
        if not raw:
            self._end(arena, told=True)
            return
        try:
            if len(raw) > records.MAX_RECORD:
                raise XditError(Code.TOO_LARGE, f"A record is over the limit of {records.MAX_RECORD} bytes.")
            asked = passing.codec.decode(raw, records.ToDaemon, passing.codec.tags(records.ToDaemon))
        except XditError as error:
            log.warning("Process %d (uid %d) broke the arena exchange: %s", arena.pid, arena.uid, error)
            _refuse(arena._sock, error)
            self._end(arena, told=True)
            return
        if isinstance(asked, records.OpenLane):
            self._open_lane(arena)
            return
        # One at a time: its connection is read again when this is answered.
        asyncio.get_running_loop().remove_reader(arena._sock.fileno())
        arena.growing = asyncio.create_task(self._grow(arena, asked.nbytes))

    def _open_lane(self, arena: Arena) -> None:
        theirs = -1
        try:
            if not arena.claimed or arena.has_lane or self._on_lane is None:
                raise XditError(
                    Code.NOT_PERMITTED, "A lane is for a client that has said hello, and it gets one."
                )
            if self._descriptors + 2 > self._max_descriptors:
                raise _no_descriptors()
            try:
                lane, theirs = pair()
            except OSError as error:
                raise _no_descriptors() from error
            arena.has_lane = True
            self._descriptors += 1
            passing.send(arena._sock, records.LaneOpened(), theirs)
            self._on_lane(arena.token, lane)
        except XditError as error:
            if not _refuse(arena._sock, error):
                self._end(arena, told=True)
        except OSError as error:
            log.info("Process %d did not take its lane: %s.", arena.pid, error.strerror)
            lane.close()
            self._end(arena, told=True)
        finally:
            if theirs >= 0:
                os.close(theirs)

    # ------------------------------------------------------------------------------------------------ segments

    async def _grow(self, arena: Arena, nbytes: int) -> None:
        """Makes a segment, off the event loop, and sends it; or says why not."""
        try:
            size = self._reserve(arena, nbytes)
        except XditError as error:
            self._answer_refused(arena, error)
            return
        fd = -1
        try:
            fd = await asyncio.to_thread(segments.create, size)
        except XditError as error:
            self._give_back(size)
            self._answer_refused(arena, error)
            return
        except BaseException:
            self._give_back(size)
            raise
        if arena.token not in self._arenas:  # it ended while the segment was made
            os.close(fd)
            self._give_back(size)
            return
        segment_id = next(self._ids)
        opening = not arena.segments
        arena.segments[segment_id] = size
        arena._fds[segment_id] = fd
        record: records.Leased | records.Segment
        if opening:
            record = records.Leased(
                version=records.VERSION, token=arena.token, segment=segment_id, nbytes=size
            )
        else:
            record = records.Segment(segment=segment_id, nbytes=size)
        try:
            passing.send(arena._sock, record, fd)
        except OSError as error:
            log.info("Process %d did not take its segment: %s.", arena.pid, error.strerror)
            self._end(arena, told=True)
            return
        self._listen(arena)

    def _reserve(self, arena: Arena, nbytes: int) -> int:
        """Bytes to make the segment of: the common size where the budgets allow it, else what was asked."""
        held = arena.nbytes
        left = min(self._per_client - held, self._total - self._reserved)
        size = max(_pages(nbytes), self._first)
        if size > left:
            size = _pages(nbytes)
        if self._descriptors + 1 > self._max_descriptors:
            raise _no_descriptors()
        if size > left:
            if held + size > self._per_client:
                why = f"a client may have {self._per_client} bytes and this one has {held}"
            else:
                why = f"all clients together may have {self._total} bytes and have {self._reserved}"
            raise XditError(
                Code.ARENA_EXHAUSTED,
                f"A segment of {nbytes} bytes is more than the daemon grants: {why}. Raise the arena limits in the "
                "daemon's configuration, or close clients.",
            )
        self._reserved += size
        self._descriptors += 1
        return size

    def _give_back(self, size: int) -> None:
        self._reserved -= size
        self._descriptors -= 1

    def _answer_refused(self, arena: Arena, error: XditError) -> None:
        if arena.token not in self._arenas:
            return
        sent = _refuse(arena._sock, error)
        if sent and arena.segments:
            self._listen(arena)
        else:  # it has nothing to live on, or does not read
            self._end(arena, told=True)

    def _listen(self, arena: Arena) -> None:
        arena.growing = None
        asyncio.get_running_loop().add_reader(arena._sock.fileno(), self._readable, arena)

    def _end(self, arena: Arena, told: bool = False) -> None:
        """The one place where a lease ends."""
        if self._arenas.pop(arena.token, None) is None:
            return
        asyncio.get_running_loop().remove_reader(arena._sock.fileno())
        arena._sock.close()
        self._descriptors -= 1 + arena.has_lane
        for segment_id, fd in arena._fds.items():
            os.close(fd)
            self._give_back(arena.segments[segment_id])
        arena._fds.clear()
        if told and arena.claimed:
            self._on_gone(arena.token)


def _refuse(sock: socket.socket, error: XditError) -> bool:
    code = error.code.value if isinstance(error.code, Code) else error.code
    try:
        passing.send(sock, records.Refused(code=code, message=error.message))
    except OSError:
        return False  # it is gone or does not read: its end of file is dealt with where it is read
    return True


def _no_descriptors() -> XditError:
    return XditError(
        Code.ARENA_EXHAUSTED,
        "The daemon has no file descriptors left for another client or segment. Close clients, or raise LimitNOFILE= "
        "of its unit.",
    )


def _pages(nbytes: int) -> int:
    return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
