"""A client's shared memory begins with its connection, grows within its budget, and ends with it, whatever it does."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.handoff.host import MIB, Host, descriptors, lease, segments_of
from xditd.handoff import passing, records, segments
from xditd.handoff.arena import Arena
from xditd.handoff.lane import Lane
from xditd.handoff.lease import Lease
from xditd.protocol import codec
from xditd.protocol.errors import Code, XditError

CLIENT = """
import sys
from xditd.handoff.arena import Arena
from xditd.handoff.lease import Lease
arenas = [Arena(Lease(sys.argv[1], 10)) for _ in range(4)]
slots = [arena.take(3 << 20) for arena in arenas]  # over the first segment: each grows
for slot in slots:
    slot.memory[:8] = b"written!"
print(*[arena.lease.token for arena in arenas], flush=True)
sys.stdin.read()
"""


# ------------------------------------------------------------------------------------------------------ beginning


def test_a_lease_opens_with_a_token_and_a_segment_that_the_daemon_knows(host: Host) -> None:
    with_it = lease(host)
    arena = host.do(lambda: host.arenas.claim(with_it.token))
    assert (arena.pid, arena.uid) == (os.getpid(), os.getuid())
    assert len(with_it.token) == 32
    segment_id, segment = with_it.first
    assert arena.segments == {segment_id: MIB}
    segment.view(64, 5)[:] = b"hello"
    assert os.pread(arena.fd(segment_id), 5, 64) == b"hello"
    assert host.do(lambda: host.arenas.in_use_bytes) == MIB
    assert host.do(host.arenas.list) == [arena]
    with_it.close()


def test_a_token_is_claimed_once_and_an_invented_one_never(host: Host) -> None:
    ours = lease(host)
    host.do(lambda: host.arenas.claim(ours.token))
    for token in (ours.token, "0" * 32, ""):
        with pytest.raises(XditError) as refusal:
            host.do(lambda token=token: host.arenas.claim(token))
        assert refusal.value.code == Code.NOT_PERMITTED
    ours.close()


def test_an_arena_gives_no_descriptor_of_another_ones_segment(host: Host) -> None:
    one, two = lease(host), lease(host)
    first = host.do(lambda: host.arenas.claim(one.token))
    assert one.first[0] != two.first[0]
    with pytest.raises(XditError) as refusal:
        first.fd(two.first[0])
    assert refusal.value.code == Code.BAD_SLOT
    one.close()
    two.close()


# -------------------------------------------------------------------------------------------------- growth, limits


def test_an_arena_grows_by_another_segment_where_no_slot_fits(host: Host) -> None:
    arena = Arena(lease(host))
    slots = [arena.take(MIB // 2) for _ in range(2)]
    assert arena.capacity == MIB
    further = arena.take(3 * MIB)
    assert arena.capacity == 4 * MIB
    assert len({(slot.segment, slot.offset) for slot in [*slots, further]}) == 3
    assert host.do(lambda: host.arenas.in_use_bytes) == 4 * MIB
    for slot in [*slots, further]:
        arena.give(slot)
    assert arena.in_use == 0
    assert arena.take(3 * MIB).segment == further.segment  # not grown for again
    arena.close()


def test_exhaustion_names_what_was_asked_what_is_held_and_the_cure_and_serving_goes_on(host: Host) -> None:
    arena = Arena(lease(host))
    held = arena.take(MIB)
    with pytest.raises(XditError) as refusal:
        arena.take(8 * MIB)
    assert refusal.value.code == Code.ARENA_EXHAUSTED
    assert refusal.value.details == {"asked": 8 * MIB, "in_use": MIB, "capacity": MIB}
    for part in (str(8 * MIB), str(MIB), "configuration", "Let go of results"):
        assert part in refusal.value.message
    arena.give(held)
    arena.give(arena.take(7 * MIB))  # what its budget still allows, to the last byte
    with pytest.raises(XditError):
        arena.take(7 * MIB + 1)
    assert arena.in_use == 0
    arena.close()


def test_all_clients_together_stay_under_the_total_and_a_death_makes_room(tmp_path: Path) -> None:
    with Host(tmp_path / "a.sock", per_client=8 * MIB, total=3 * MIB) as host:
        clients = [lease(host) for _ in range(3)]
        with pytest.raises(XditError) as refusal:
            lease(host)
        assert refusal.value.code == Code.ARENA_EXHAUSTED
        assert "all clients together" in refusal.value.message
        clients[0].close()
        host.until(lambda: host.arenas.in_use_bytes == 2 * MIB)
        lease(host).close()
        for client in clients[1:]:
            client.close()


def test_a_result_gives_its_slot_back_when_its_last_view_is_gone_and_not_before(host: Host) -> None:
    arena = Arena(lease(host))
    lent = arena.lend(arena.take(MIB))
    part = lent[1000:2000]
    del lent
    gc.collect()
    assert arena.in_use == MIB  # a slice of it lives
    other = arena.take(1000)
    assert other.segment != arena.lease.first[0]
    part[:4] = b"mine"
    del part
    assert arena.in_use == 1024
    arena.give(other)
    arena.close()


def test_results_outlive_their_arena(host: Host) -> None:
    before = segments_of()
    arena = Arena(lease(host))
    lent = arena.lend(arena.take(100))
    arena.close()
    lent[0] = 7
    assert bytes(lent)[0] == 7
    host.until(lambda: host.arenas.in_use_bytes == 0)
    del lent, arena
    gc.collect()
    assert segments_of() == before


# ------------------------------------------------------------------------------------------------------------ lanes


def test_a_lane_carries_messages_both_ways_and_ends_with_either_end(tmp_path: Path) -> None:
    lanes: dict[str, Lane] = {}
    with Host(tmp_path / "a.sock", on_lane=lanes.__setitem__) as host:
        ours = lease(host)
        host.do(lambda: host.arenas.claim(ours.token))
        lane = ours.open_lane()
        theirs = lanes[ours.token]
        assert lane.receive() is None
        assert lane.send(b"ask")
        assert theirs.receive() == b"ask"
        assert theirs.send(b"one")
        assert theirs.send(b"two")
        assert (lane.receive(), lane.receive(), lane.receive()) == (b"one", b"two", None)
        assert any(not lane.send(bytes(60_000)) for _ in range(100))  # full is said, not waited for
        lane.close()
        while theirs.receive():
            pass
        assert theirs.receive() == b""
        assert not theirs.send(b"anybody?")
        theirs.close()
        ours.close()


@pytest.mark.parametrize("reason", ["no hello", "a second one", "no lanes here"])
def test_who_may_have_no_lane_is_told_so(tmp_path: Path, reason: str) -> None:
    lanes: dict[str, Lane] = {}
    given = None if reason == "no lanes here" else lanes.__setitem__
    with Host(tmp_path / "a.sock", on_lane=given) as host:
        ours = lease(host)
        if reason != "no hello":
            host.do(lambda: host.arenas.claim(ours.token))
        if reason == "a second one":
            ours.open_lane().close()
        with pytest.raises(XditError) as refusal:
            ours.open_lane()
        assert refusal.value.code == Code.NOT_PERMITTED
        for lane in lanes.values():
            lane.close()


def test_lanes_count_as_descriptors_and_come_back(tmp_path: Path) -> None:
    lanes: list[Lane] = []
    with Host(tmp_path / "a.sock", max_descriptors=5, on_lane=lambda token, lane: lanes.append(lane)) as host:
        for _ in range(3):
            one, two = lease(host), lease(host)
            for client in (one, two):
                host.do(lambda client=client: host.arenas.claim(client.token))
            with pytest.raises(XditError) as refusal:
                two.open_lane()
            assert refusal.value.code == Code.ARENA_EXHAUSTED
            two.close()
            host.until(lambda: len(host.arenas.list()) == 1)
            one.open_lane().close()
            one.close()
            host.until(lambda: not host.arenas.list())
            lanes.pop().close()


# ------------------------------------------------------------------------------------------------------------- ends


def test_killed_clients_leave_no_memory_no_descriptor_and_are_told_of_once(tmp_path: Path) -> None:
    with Host(tmp_path / "a.sock", total=100 * MIB) as host:
        kill_clients(host)


def kill_clients(host: Host) -> None:
    gc.collect()
    before = (len(descriptors()), segments_of())
    tokens: list[str] = []
    processes = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, host.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    for process in processes:
        assert process.stdout is not None
        tokens += process.stdout.readline().split()
    assert len(tokens) == 20
    assert host.do(lambda: host.arenas.in_use_bytes) == 20 * 4 * MIB
    for token in tokens:
        host.do(lambda token=token: host.arenas.claim(token))
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    host.until(lambda: host.arenas.in_use_bytes == 0)
    assert sorted(host.gone) == sorted(tokens)
    assert host.do(host.arenas.list) == []
    gc.collect()
    assert (len(descriptors()), segments_of()) == before


def test_a_client_sees_at_once_that_its_daemon_is_gone(tmp_path: Path) -> None:
    with Host(tmp_path / "a.sock") as host:
        ours = lease(host)
        assert not ours.gone
        host.close()
        assert ours.gone
        with pytest.raises(XditError) as failure:
            ours.grow(1)
        assert failure.value.code == Code.DAEMON_LOST
        assert host.gone == []  # the daemon ended it, and knows


def test_a_lease_that_the_daemon_releases_ends_silently_and_its_ids_are_not_used_again(host: Host) -> None:
    ours = lease(host)
    arena = host.do(lambda: host.arenas.claim(ours.token))
    host.do(lambda: host.arenas.release(ours.token))
    host.do(lambda: host.arenas.release(ours.token))
    assert ours.gone
    assert host.gone == []
    assert arena.segments == {ours.first[0]: MIB}  # to tell ranks what to drop
    with pytest.raises(XditError):
        arena.fd(ours.first[0])
    again = lease(host)
    assert again.first[0] > ours.first[0]
    again.close()


def test_nobody_is_told_of_a_lease_that_nobody_claimed(host: Host) -> None:
    lease(host).close()
    claimed = lease(host)
    host.do(lambda: host.arenas.claim(claimed.token))
    claimed.close()
    host.until(lambda: not host.arenas.list())
    assert host.gone == [claimed.token]


def test_a_forked_child_does_not_keep_the_lease_of_its_dead_parent(host: Host) -> None:
    script = (
        "import os, sys, time\nfrom xditd.handoff.lease import Lease\n"
        "lease = Lease(sys.argv[1], 10)\n"
        "if os.fork() == 0:\n    print(lease.fileno(), flush=True); time.sleep(60); os._exit(0)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, host.path], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "-1\n"  # closed in the child
            process.kill()
            host.until(lambda: not host.arenas.list())
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# -------------------------------------------------------------------------------------------------- bad neighbours


def raw_client(host: Host) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(host.path)
    record, fd = passing.receive(sock, records.ToClient, 10)
    assert isinstance(record, records.Leased)
    assert fd is not None
    os.close(fd)
    return sock


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc1garbage",
        b"x" * 6000,
        codec.encode(records.Refused(code="a", message="b")),
        codec.encode(records.Grow(nbytes=-1)),
        codec.encode(records.Grow(nbytes=0)),
        codec.encode(records.Grow(nbytes=2**60)),
    ],
)
def test_what_is_no_request_ends_that_connection_with_a_reason_and_no_other(host: Host, raw: bytes) -> None:
    good, bad = lease(host), raw_client(host)
    bad.send(raw)
    refusal, fd = passing.receive(bad, records.ToClient, 10)
    assert isinstance(refusal, records.Refused)
    assert fd is None
    with pytest.raises(passing.EndOfFile):
        passing.receive(bad, records.ToClient, 10)
    bad.close()
    host.until(lambda: len(host.arenas.list()) == 1)
    assert good.grow(10)[1].nbytes == MIB
    good.close()


def test_more_than_can_be_granted_is_refused_and_the_lease_lives(host: Host) -> None:
    ours = lease(host)
    with pytest.raises(XditError) as refusal:
        ours.grow(2**50)
    assert refusal.value.code == Code.ARENA_EXHAUSTED
    assert ours.grow(2 * MIB)[1].nbytes == 2 * MIB
    ours.close()


def test_descriptors_that_a_client_sends_are_not_kept(host: Host) -> None:
    bad = raw_client(host)
    before = len(descriptors())
    read, write = os.pipe()
    socket.send_fds(bad, [codec.encode(records.Grow(nbytes=1))], [write])
    os.close(write)
    record, fd = passing.receive(bad, records.ToClient, 10)
    assert isinstance(record, records.Segment)
    assert fd is not None
    os.close(fd)
    assert os.read(read, 1) == b""  # nobody else has the other end
    os.close(read)
    assert len(descriptors()) == before + 1  # the segment, in the daemon, which is this process
    bad.close()


def test_a_client_that_asks_without_reading_is_dropped_and_others_are_served(host: Host) -> None:
    bad = raw_client(host)
    bad.setblocking(False)
    ask = codec.encode(records.Grow(nbytes=2**50))  # refused, over and over
    deadline = time.monotonic() + 20
    while host.do(host.arenas.list):
        assert time.monotonic() < deadline
        try:
            bad.send(ask)
        except BlockingIOError:
            continue
        except BrokenPipeError:
            break
    host.until(lambda: not host.arenas.list())
    lease(host).close()
    bad.close()


def test_a_client_that_goes_while_its_segment_is_made_costs_nothing(host: Host) -> None:
    before = len(descriptors())
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(host.path)
        sock.close()
    host.until(lambda: not host.arenas.list() and host.arenas.in_use_bytes == 0)
    lease(host).close()
    host.until(lambda: not host.arenas.list())
    assert len(descriptors()) == before


def test_a_daemon_that_stops_while_a_segment_is_made_keeps_nothing_of_it(tmp_path: Path, monkeypatch) -> None:
    begun, go_on, create = threading.Event(), threading.Event(), segments.create

    def slow(nbytes: int) -> int:
        begun.set()
        assert go_on.wait(10)
        return create(nbytes)

    with Host(tmp_path / "a.sock") as host:
        before = len(descriptors())
        monkeypatch.setattr(segments, "create", slow)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(host.path)
            assert begun.wait(10)
            closing = threading.Thread(target=host.close)
            closing.start()
            host.until(lambda: not host.arenas.list())
            go_on.set()
            closing.join(10)
        assert host.arenas.in_use_bytes == 0
        assert len(descriptors()) == before - 2  # the listener, and the spare one


def test_leases_stop_at_their_share_of_descriptors(tmp_path: Path) -> None:
    with Host(tmp_path / "a.sock", max_descriptors=5) as host:
        clients = [lease(host), lease(host)]
        with pytest.raises(XditError, match="file descriptors") as refusal:
            lease(host)
        assert refusal.value.code == Code.ARENA_EXHAUSTED
        clients[0].grow(1)
        with pytest.raises(XditError, match="file descriptors"):
            clients[0].grow(1)
        clients[0].close()
        host.until(lambda: len(host.arenas.list()) == 1)
        lease(host).close()
        clients[1].close()


def test_connecting_tells_what_is_wrong_with_the_socket(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lease(str(tmp_path / "none"), 1)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(tmp_path / "dead"))
    with pytest.raises(OSError, match="refused") as refused:
        Lease(str(tmp_path / "dead"), 1)
    assert refused.value.errno == errno.ECONNREFUSED
    dead.close()


def test_a_daemon_of_another_version_of_the_exchange_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            fd = segments.create(4096)
            passing.send(sock, records.Leased(version=2, token="t", segment=1, nbytes=4096), fd)
            os.close(fd)
            sock.close()

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(XditError) as refusal:
            Lease(str(path), 10)
        server.join()
        assert refusal.value.code == Code.UNSUPPORTED_VERSION
