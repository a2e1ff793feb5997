"""Rank 0 receives the segments it is passed, waits for those that are named, and forgets what it is told to."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.handoff.host import descriptors, open_files_limit, segments_of
from xditd.handoff import passing, records
from xditd.handoff.passing import ReceivedSegments, pass_segment
from xditd.handoff.segments import create
from xditd.protocol import codec
from xditd.protocol.errors import Code, XditError

SIZE = 1 << 16


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, ReceivedSegments]]:
    gc.collect()
    daemon, rank = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received = ReceivedSegments(rank.detach())
    yield daemon, received
    daemon.close()
    received.close()


def give(daemon: socket.socket, segment_id: int, nbytes: int = SIZE) -> None:
    fd = create(nbytes)
    pass_segment(daemon, segment_id, fd, nbytes)
    os.close(fd)


def test_segments_come_by_the_id_that_an_order_names_in_any_order(pair) -> None:
    daemon, received = pair
    for segment_id in (7, 9, 8):
        give(daemon, segment_id, SIZE * segment_id)
    assert received.get(8).nbytes == SIZE * 8
    assert received.get(7).nbytes == SIZE * 7
    assert received.get(8) is received.get(8)
    assert len(received) == 3


def test_get_waits_for_a_segment_that_is_on_its_way(pair) -> None:
    daemon, received = pair
    asked = threading.Event()

    def later() -> None:
        asked.wait(10)
        give(daemon, 1)

    sender = threading.Thread(target=later)
    sender.start()
    asked.set()
    assert received.get(1, timeout=10).nbytes == SIZE
    sender.join()


def test_a_segment_that_never_comes_is_a_timeout(pair) -> None:
    _, received = pair
    with pytest.raises(XditError) as failure:
        received.get(1, timeout=0.01)
    assert failure.value.code == Code.TIMEOUT


def test_a_daemon_that_is_gone_is_said_so_at_once(pair) -> None:
    daemon, received = pair
    give(daemon, 1)
    daemon.close()
    assert received.get(1).nbytes == SIZE  # what it had sent still comes
    with pytest.raises(XditError) as failure:
        received.get(2, timeout=60)
    assert failure.value.code == Code.DAEMON_LOST
    received.drop([1])
    assert len(received) == 0


def test_dropped_segments_are_closed_and_unmapped_those_never_read_too(pair) -> None:
    daemon, received = pair
    before = segments_of()
    give(daemon, 1)
    give(daemon, 2)
    view = received.get(1).view(0, 4)
    give(daemon, 3)
    received.drop([1, 2, 3, 99])
    assert len(received) == 0
    give(daemon, 4)
    received.get(4)
    assert len(received) == 1  # the third was not left to be read now
    received.drop([4])
    view[:] = b"live"  # a turn under way may still read what it reads
    del view
    assert segments_of() == before


def test_a_segment_without_seals_is_refused(pair) -> None:
    daemon, received = pair
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, SIZE)
    pass_segment(daemon, 1, fd, SIZE)
    os.close(fd)
    with pytest.raises(XditError) as failure:
        received.get(1)
    assert failure.value.code == Code.BAD_SLOT


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"x" * 5000, codec.encode(records.Grow(nbytes=1))])
def test_garbage_with_a_descriptor_leaves_no_descriptor_behind(pair, raw: bytes) -> None:
    daemon, received = pair
    before = len(descriptors())
    fd = create(SIZE)
    socket.send_fds(daemon, [raw], [fd])
    os.close(fd)
    with pytest.raises(XditError):
        received.get(1, timeout=1)
    assert len(descriptors()) == before


def test_a_process_without_descriptors_says_that_it_has_none(pair) -> None:
    daemon, received = pair
    fd = create(SIZE)
    pass_segment(daemon, 1, fd, SIZE)
    held: list[int] = []
    with open_files_limit(max(map(int, os.listdir("/proc/self/fd")))):
        with pytest.raises(OSError, match="Too many open files"):
            held.extend(iter(lambda: os.dup(fd), None))
        with pytest.raises(XditError, match="no file descriptors") as failure:
            received.get(1)
    for other in [*held, fd]:
        os.close(other)
    assert failure.value.code == Code.ARENA_EXHAUSTED


def test_a_rank_that_is_gone_or_does_not_read_is_an_error_and_no_wait() -> None:
    daemon, rank = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = create(SIZE)
    with pytest.raises(XditError) as full:
        any(pass_segment(daemon, segment_id, fd, SIZE) for segment_id in range(100_000))
    assert full.value.code == Code.RANK_FAILED
    rank.close()
    with pytest.raises(XditError) as gone:
        pass_segment(daemon, 1, fd, SIZE)
    assert gone.value.code == Code.RANK_LOST
    os.close(fd)
    daemon.close()


def test_segments_go_to_another_process() -> None:
    """As a rank receives them: by an inherited socket, in a process of its own."""
    daemon, rank = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = (
        "import sys; from xditd.handoff.passing import ReceivedSegments\n"
        "view = ReceivedSegments(int(sys.argv[1])).get(5).view(64, 4)\n"
        "view[:] = bytes(reversed(view)); print('done')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(rank.fileno())],
        pass_fds=[rank.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        rank.close()
        fd = create(SIZE)
        os.pwrite(fd, b"abcd", 64)
        pass_segment(daemon, 5, fd, SIZE)
        assert process.communicate(timeout=30)[0] == "done\n"
    assert os.pread(fd, 4, 64) == b"dcba"
    os.close(fd)
    daemon.close()


def test_a_program_that_is_started_later_inherits_nothing_that_was_received() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = create(SIZE)
    passing.send(one, records.Segment(segment=1, nbytes=SIZE), given)
    _, fd = passing.receive(two, records.Segment, 1)
    assert fd is not None
    held = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
    )
    assert "memfd:xditd" in os.readlink(f"/proc/self/fd/{fd}")
    assert "memfd:xditd" not in held.stdout
    for other in (given, fd):
        os.close(other)
    one.close()
    two.close()


def test_receive_only_looks_with_a_timeout_of_nothing() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pytest.raises(XditError) as failure:
        passing.receive(two, records.Segment, 0)
    assert failure.value.code == Code.TIMEOUT
    one.close()
    two.close()
