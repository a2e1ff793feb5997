"""A client written from protocol.md alone, with nothing of xditd's: so that anybody can write one.

ZeroMQ, MessagePack, a socket and mmap, against a real daemon whose ranks do no work.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from typing import Any

import msgpack
import pytest
import zmq

from tests.live.service import Service

ECHO = {"kind": "echo", "name": "echo"}
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SHAPE = [1, 16, 32, 32]
NBYTES = 16 * 32 * 32 * 4


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    settings = {
        "debug.echo": True,
        "devices.kind": "cpu",
        "devices.cpu_ranks": 1,
        "arena.first_bytes": "1MiB",
    }
    service = Service(tmp_path_factory.mktemp("s"), settings)
    yield service
    service.kill()


class Stranger:
    """Sections 1 and 2."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self.socket.connect(endpoint)
        self.last = 0

    def send(self, kind: str, *frames: bytes, **fields: Any) -> int:
        self.last += 1
        self.socket.send_multipart([msgpack.packb({"type": kind, "id": self.last, **fields}), *frames])
        return self.last

    def hear(self) -> tuple[dict[str, Any], list[bytes]]:
        header, *frames = self.socket.recv_multipart()
        return msgpack.unpackb(header), frames

    def ask(self, kind: str, *frames: bytes, **fields: Any) -> dict[str, Any]:
        """The answer; its events and frames are kept beside it."""
        number = self.send(kind, *frames, **fields)
        self.events = []
        while True:
            message, self.frames = self.hear()
            assert message["re"] == number
            if message["type"] not in ("queued", "progress", "rebound"):
                return message
            self.events.append(message)


class Lease:
    """Section 3."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.segments: dict[int, mmap.mmap] = {}
        leased = self.receive()
        assert (leased["type"], leased["version"]) == ("leased", 1)
        self.token = leased["token"]
        self.first = leased["segment"]

    def receive(self) -> dict[str, Any]:
        raw, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 1)
        record = msgpack.unpackb(raw)
        for descriptor in descriptors:
            assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
            assert os.fstat(descriptor).st_size == record["nbytes"]
            self.segments[record["segment"]] = mmap.mmap(descriptor, record["nbytes"])
            os.close(descriptor)
        return record

    def grow(self, nbytes: int) -> dict[str, Any]:
        self.socket.send(msgpack.packb({"type": "grow", "nbytes": nbytes}))
        return self.receive()


def test_a_stranger_takes_a_step_and_samples_through_shared_memory(daemon):
    lease = Lease(f"{daemon.folder}/xditd.sock.arena")
    stranger = Stranger(daemon.endpoint)
    welcome = stranger.ask("hello", versions=[1, 1], client="a stranger", token=lease.token)
    assert (welcome["type"], welcome["version"]) == ("welcome", 1)
    assert "shared_memory" in welcome["capabilities"]

    opened = stranger.ask("open_run", model=ECHO, plan={})
    assert opened["type"] == "run_opened"
    assert opened["model"]["family"] == "echo"
    run = opened["run"]
    assert {event["run"] for event in stranger.events} <= {run}

    memory = lease.segments[lease.first]
    x = {"dtype": "float32", "shape": SHAPE, "segment": lease.first, "offset": 0}
    out = {**x, "offset": NBYTES}
    memory[:NBYTES] = bytes(range(256)) * (NBYTES // 256)
    put = stranger.ask("put_conditioning", run=run, key="a cat", tensors={"context": x}, values={})
    assert (put["type"], put["key"]) == ("conditioning_put", "a cat")
    answer = stranger.ask(
        "denoise", run=run, items=[{"x": x, "t": [1.0], "conditioning": "a cat", "out": out}]
    )
    assert answer["type"] == "denoised"
    assert answer["outputs"] == [out]
    assert stranger.frames == []
    assert memory[NBYTES : 2 * NBYTES] == memory[:NBYTES]

    grown = lease.grow(4 * NBYTES)
    assert grown["type"] == "segment"
    previews = [{**x, "segment": grown["segment"], "offset": i * NBYTES} for i in (1, 2)]
    sampled = stranger.ask(
        "sample", run=run, sampler="euler", sigmas=[1.0, 0.5, 0.0], noise=x, conditioning="a cat", out=out,
        previews=previews,
    )  # fmt: skip
    assert (sampled["type"], sampled["steps"], sampled["latent"]) == ("sampled", 2, out)
    assert [(e["step"], e["total"], e["sigma"], e["preview"]) for e in stranger.events] == [
        (1, 2, 0.5, previews[0]),
        (2, 2, 0.0, previews[1]),
    ]
    assert lease.grow(1 << 40)["type"] == "refused"
    assert stranger.ask("close", run=run) == {"type": "closed", "re": stranger.last, "run": run}


def test_a_stranger_without_shared_memory_sends_frames(daemon):
    stranger = Stranger(daemon.endpoint)
    assert stranger.ask("status")["code"] == "hello_required"
    stranger.ask("hello", versions=[1, 7], client="a stranger")
    run = stranger.ask("open_run", model=ECHO)["run"]
    x = {"dtype": "float32", "shape": SHAPE, "frame": 0}
    data = os.urandom(NBYTES)
    stranger.ask("put_conditioning", data, run=run, key="a", tensors={"context": x})
    answer = stranger.ask("denoise", data, run=run, items=[{"x": x, "t": [0.5], "conditioning": "a"}])
    assert answer["outputs"] == [x]
    assert stranger.frames == [data]
    sampled = stranger.ask(
        "sample",
        data,
        run=run,
        sampler="ddim",
        sigmas=[1.0, 0.0],
        noise=x,
        conditioning="a",
        preview_frames=True,
    )
    assert stranger.frames[sampled["latent"]["frame"]] == data
    (progress,) = stranger.events
    assert progress["preview"]["dtype"] == "float32"

    # What section 2 says of ids, and section 4 of what one side does not know.
    stranger.last -= 1
    stranger.send("status")
    assert stranger.ask("levitate")["code"] == "unknown_type"
    assert stranger.ask("status", of_tomorrow={"a": [1]})["type"] == "status_report"
    failed = stranger.ask("denoise", run=run, items=[{"x": x, "t": [0.5], "conditioning": "a"}])
    assert (failed["type"], failed["code"]) == ("failed", "bad_slot")
    assert stranger.ask("cancel", run=run)["type"] == "cancelled"
    assert stranger.ask("close", run=run)["code"] == "no_such_run"


def test_the_end_of_the_lease_is_the_end_of_the_run(daemon):
    lease = Lease(f"{daemon.folder}/xditd.sock.arena")
    stranger, other = Stranger(daemon.endpoint), Stranger(daemon.endpoint)
    stranger.ask("hello", versions=[1, 1], client="short-lived", token=lease.token)
    other.ask("hello", versions=[1, 1])
    run = stranger.ask("open_run", model=ECHO)["run"]
    assert run in {status["run"] for status in other.ask("status")["runs"]}
    lease.socket.close()
    while run in {status["run"] for status in other.ask("status")["runs"]}:
        pass
    assert stranger.ask("status")["code"] == "hello_required"
