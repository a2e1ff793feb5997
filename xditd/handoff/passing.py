"""Descriptors over AF_UNIX: records with at most one descriptor each. It knows no budgets and no slots.

Sockets are SEQPACKET, so that a record and its descriptor arrive whole or not at all. No call here blocks except
`receive` and `ReceivedSegments.get`, which wait up to the time they are given.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from xditd.handoff import records
from xditd.handoff.segments import Segment
from xditd.protocol import codec
from xditd.protocol.errors import Code, XditError


class EndOfFile(Exception):
    """The other end of the socket is gone."""


def send(sock: socket.socket, record: Struct, fd: int | None = None) -> None:
    """Sends one record at once, with a descriptor that stays the sender's.

    Raises:
        OSError: as sendmsg does; BlockingIOError where the receiver does not read.
    """
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([codec.encode(record)], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, union: Any, timeout: float) -> tuple[Any, int | None]:
    """One record of the union and the descriptor that came with it, which is the caller's from then on.

    Args:
        sock: where it comes from.
        union: one tagged struct, or a union of them.
        timeout: seconds to wait for it; 0 only looks.

    Raises:
        EndOfFile: the other end is gone.
        XditError: `timeout`, or `bad_message` and the codec's other codes for what is no such record.
    """
    if not _readable(sock, timeout):
        raise XditError(Code.TIMEOUT, f"Nothing came over the socket within {timeout:.3g} s.")
    try:
        raw, fds, flags = receive_fds(sock, records.MAX_RECORD, 1, socket.MSG_DONTWAIT)
    except ConnectionError as error:
        raise EndOfFile from error
    except BlockingIOError as error:
        raise XditError(Code.TIMEOUT, "What came over the socket was read by somebody else.") from error
    fd = fds[0] if fds else None
    try:
        if not raw and fd is None:
            raise EndOfFile
        if flags & socket.MSG_CTRUNC:
            raise XditError(
                Code.ARENA_EXHAUSTED,
                "A descriptor could not be received: this process has no file descriptors left. "
                "Raise its limit (ulimit -n, LimitNOFILE=).",
            )
        if flags & socket.MSG_TRUNC:
            raise XditError(Code.TOO_LARGE, f"A record is over the limit of {records.MAX_RECORD} bytes.")
        return codec.decode(raw, union, codec.tags(union)), fd
    except BaseException:
        for other in fds:
            os.close(other)
        raise


def receive_fds(sock: socket.socket, nbytes: int, count: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """One record and the descriptors that came with it, which no program that is started later inherits.

    As `socket.recv_fds`, which in CPython ignores its flags, and so lets every child have what it received.

    Args:
        nbytes: of the longest record.
        count: of the most descriptors.
        flags: of recvmsg.

    Returns:
        The record, the descriptors, and the flags that recvmsg answers.
    """
    fds = array.array("i")
    room = socket.CMSG_LEN(count * fds.itemsize)
    raw, ancillary, answered, _ = sock.recvmsg(nbytes, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return raw, fds.tolist(), answered


def pass_segment(sock: socket.socket, segment_id: int, fd: int, nbytes: int) -> None:
    """Gives a segment to rank 0 of a group. Send it before the first order that names the segment.

    Args:
        sock: the daemon's end of the socket pair whose other end is the rank's `arena_fd`.
        segment_id: unique in the daemon's life.
        fd: the segment's descriptor; stays the daemon's.
        nbytes: its size.

    Raises:
        XditError: `rank_lost` where the rank is gone, `rank_failed` where it does not take what is sent.
    """
    try:
        send(sock, records.Segment(segment=segment_id, nbytes=nbytes), fd)
    except (BrokenPipeError, ConnectionError) as error:
        raise XditError(Code.RANK_LOST, "Rank 0 is gone: it can be given no segment.") from error
    except OSError as error:
        raise XditError(
            Code.RANK_FAILED, f"Rank 0 takes no segments: {os.strerror(error.errno or 0)}."
        ) from error


class ReceivedSegments:
    """Rank 0's side: the segments that the daemon passed, by id. For one thread.

    Args:
        fd: the rank's end of the socket pair (`RankSpec.arena_fd`); taken over.
    """

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._segments: dict[int, Segment] = {}

    def get(self, segment_id: int, timeout: float = 10.0) -> Segment:
        """The segment of that id; reads the socket until it has come.

        Args:
            segment_id: as an order's `Tensor.segment` names it.
            timeout: seconds to wait. The daemon passes a segment before it names it, so a wait is a fault.

        Raises:
            XditError: `timeout`; `daemon_lost` where the daemon is gone; `bad_slot` for a descriptor that is no
                sealed segment.
        """
        segment = self._segments.get(segment_id)
        if segment is not None:
            return segment
        deadline = time.monotonic() + timeout
        try:
            while segment_id not in self._segments:
                if not self._take(max(0.0, deadline - time.monotonic())):
                    raise XditError(
                        Code.TIMEOUT,
                        f"Segment {segment_id} was named but did not come within {timeout:.3g} s.",
                    )
        except EndOfFile as error:
            raise XditError(
                Code.DAEMON_LOST, "The daemon is gone: no further segments can come from it."
            ) from error
        return self._segments[segment_id]

    def drop(self, ids: Iterable[int]) -> None:
        """Forgets segments, those still unread in the socket too. Views that live keep their memory mapped."""
        # A daemon that is gone passes nothing more; the orders' socket tells.
        with contextlib.suppress(EndOfFile):
            while self._take(0):
                pass
        for segment_id in ids:
            segment = self._segments.pop(segment_id, None)
            if segment is not None:
                segment.close()

    def close(self) -> None:
        """Unmaps all and closes the socket."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._sock.close()

    def __len__(self) -> int:
        return len(self._segments)

    def _take(self, timeout: float) -> bool:
        if not _readable(self._sock, timeout):
            return False
        record, fd = receive(self._sock, records.Segment, 0)
        if fd is None:
            raise XditError(Code.BAD_MESSAGE, f"Segment {record.segment} came without its descriptor.")
        self._segments[record.segment] = Segment(fd, record.nbytes)
        return True


def _readable(sock: socket.socket, timeout: float) -> bool:
    """Whether a record or an end of file waits, after at most `timeout` seconds. Not select(): fds may be over 1023."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))
