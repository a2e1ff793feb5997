"""Many threads wait on one client; a wait can be left at any time, and what comes late hurts nobody."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from typing import Any

import pytest
import torch

from tests.client.fake_daemon import FakeDaemon
from tests.client.test_client import MODEL, in_use, x
from tests.client.threads import later
from xditd.client import Client
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError


class Stopped(Exception):
    """What an interrupt raises, as ComfyUI's does."""


def stop() -> None:
    raise Stopped


def stop_when(event: threading.Event):
    def interrupt() -> None:
        if event.is_set():
            raise Stopped

    return interrupt


class Blind:
    """A poll object that says when a thread begins to wait on it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.entered = threading.Event()

    def poll(self, timeout: float | None) -> Any:
        self.entered.set()
        return self.inner.poll(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


# ------------------------------------------------------------------------------------------------------- threads


def test_eight_threads_get_each_its_own_answers(daemon: FakeDaemon, client: Client) -> None:
    def work(seed: int) -> None:
        with client.open_run(MODEL) as run:
            generator = torch.Generator().manual_seed(seed)
            for step in range(60):
                given = torch.randn(1, 4, 8, 8, generator=generator)
                (got,) = run.denoise([(given, float(step), "c")])
                assert torch.equal(got, given * 2 + step)

    for done in [later(work, seed) for seed in range(8)]:
        done.result(60)
    gc.collect()
    assert in_use(client) == 0


def test_answers_that_come_in_any_order_reach_whoever_waits_for_them(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.hold.add("denoise")
    runs = [client.open_run(MODEL) for _ in range(8)]
    given = [x(1, 4, 4, 4) for _ in runs]
    waiting = [later(run.denoise, [(tensor, 1.0, "c")]) for run, tensor in zip(runs, given, strict=True)]
    daemon.wait_for("denoise", 8)
    daemon.do(lambda: random.Random(3).shuffle(daemon._held))
    daemon.let_go()
    for tensor, future in zip(given, waiting, strict=True):
        assert torch.equal(future.result(10)[0], tensor * 2 + 1)


def test_a_thread_that_sends_does_not_swallow_what_another_waits_for(
    daemon: FakeDaemon, client: Client
) -> None:
    """ZeroMQ's descriptor is edge-triggered: the sender's look at the socket may eat the reader's edge."""
    daemon.hold.add("denoise")
    run = client.open_run(MODEL)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            client.status()

    noise = [later(disturb) for _ in range(2)]
    try:
        for step in range(1, 41):
            waiting = later(run.denoise, [(x(1, 4, 4, 4), 0.0, "c")])
            daemon.wait_for("denoise", step)
            daemon.let_go()
            waiting.result(10)
    finally:
        done.set()
    for future in noise:
        future.result(10)


def test_a_sender_that_reads_the_readers_answer_wakes_it(daemon: FakeDaemon, sharing: Client) -> None:
    """As it must when its send swallowed the edge: here the reader never sees one."""
    daemon.hold.add("denoise")
    run, connection = sharing.open_run(MODEL), sharing._connection
    assert connection is not None
    blind = connection._channel._poll = Blind(connection._channel._poll)  # type: ignore[assignment]
    blind.inner.unregister(connection._channel._socket_fd)
    waiting = later(run.denoise, [(x(), 0.0, "c")])
    daemon.wait_for("denoise")
    assert blind.entered.wait(10)
    daemon.let_go()
    deadline = time.monotonic() + 10
    while not waiting.done():
        assert time.monotonic() < deadline, "nobody woke it"
        connection.tell(m.Status, {})
        time.sleep(0.001)
    assert waiting.result(0)


def test_while_one_thread_is_in_its_callback_others_are_served(daemon: FakeDaemon, client: Client) -> None:
    entered, leave = threading.Event(), threading.Event()

    def callback(*step: object) -> None:
        entered.set()
        assert leave.wait(10)

    with client.open_run(MODEL) as run:
        sampling = later(run.sample, x(), [1.0, 0.0], "c", callback=callback)
        assert entered.wait(10)
        assert client.status().state == "serving"
        leave.set()
        sampling.result(10)


def test_a_follower_takes_over_when_the_reader_leaves(daemon: FakeDaemon, client: Client) -> None:
    daemon.hold |= {"denoise", "status"}
    run, leave = client.open_run(MODEL), threading.Event()
    reader = later(run.denoise, [(x(), 0.0, "c")], interrupt=stop_when(leave))
    daemon.wait_for("denoise")
    follower = later(client.status)
    daemon.wait_for("status")
    leave.set()
    with pytest.raises(Stopped):
        reader.result(10)
    daemon.let_go("status")
    assert follower.result(10).state == "serving"


def test_cancel_from_another_thread_ends_a_step_that_is_waited_for(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.hold.add("denoise")
    run = client.open_run(MODEL)
    waiting = later(run.denoise, [(x(), 0.0, "c")])
    (request,) = daemon.wait_for("denoise")
    daemon.hold.add("cancel")
    cancelling = later(run.cancel)
    daemon.wait_for("cancel")
    daemon.say(m.Failed(re=request.id, code="run_cancelled", message="Run 1 was cancelled."))
    daemon.let_go("cancel")
    cancelling.result(10)
    with pytest.raises(XditError) as failure:
        waiting.result(10)
    assert failure.value.code == Code.RUN_CANCELLED
    assert in_use(client) == 0


# ------------------------------------------------------------------------------------------- leaving, and late answers


def test_an_interrupt_returns_at_once_and_cancels_the_run(daemon: FakeDaemon, client: Client) -> None:
    daemon.hold.add("denoise")
    run = client.open_run(MODEL)
    begin = time.monotonic()
    with pytest.raises(Stopped):
        run.denoise([(x(), 0.0, "c")], interrupt=stop)
    assert time.monotonic() - begin < 1
    assert daemon.wait_for("cancel")[0].run == run.id
    with pytest.raises(XditError, match="cancelled"):
        run.denoise([(x(), 0.0, "c")])
    run.close()


def test_a_slot_of_a_request_that_was_left_is_not_used_again_until_its_answer_came(
    daemon: FakeDaemon, sharing: Client
) -> None:
    """A rank may still write to it."""
    daemon.hold |= {"denoise", "cancel"}
    run = sharing.open_run(MODEL)
    run.put_conditioning("c", {"context": x(1, 5, 64)})
    with pytest.raises(Stopped):
        run.denoise([(x(), 0.0, "c")], interrupt=stop)
    (left,) = daemon.wait_for("denoise")
    daemon.wait_for("cancel")
    held = in_use(sharing)
    assert held == 2 * 4096 + 5 * 64 * 4
    daemon.hold.clear()

    with sharing.open_run(MODEL) as other:
        results = [other.denoise([(x(), 0.0, "c")])[0] for _ in range(20)]
        out = left.items[0].out
        segment = sharing._connection.arena._segments[out.segment]  # type: ignore[union-attr]
        segment.view(out.offset, 4096)[:] = b"\xff" * 4096  # the rank's late writing
        assert all(result.isfinite().all() for result in results)
        results.clear()

    # The late answer comes, nobody gets it, and its slots are free; not the conditioning's.
    daemon.let_go("denoise")
    sharing.status()
    assert in_use(sharing) == 5 * 64 * 4
    daemon.let_go("cancel")
    sharing.status()
    assert in_use(sharing) == 0


def test_a_run_that_is_not_waited_for_any_more_leaves_the_queue(daemon: FakeDaemon, client: Client) -> None:
    daemon.hold.add("open_run")
    leave = threading.Event()
    waiting = later(client.open_run, MODEL, on_event=lambda event: leave.set(), interrupt=stop_when(leave))
    (request,) = daemon.wait_for("open_run")
    daemon.say(m.Queued(re=request.id, run=77, position=3, phase="waiting"))
    with pytest.raises(Stopped):
        waiting.result(10)
    assert daemon.wait_for("cancel")[0].run == 77


def test_a_run_that_opens_too_late_is_cancelled_by_the_client(daemon: FakeDaemon, client: Client) -> None:
    daemon.hold.add("open_run")
    with pytest.raises(XditError) as failure:
        client.open_run(MODEL, timeout=0.05)
    assert failure.value.code == Code.TIMEOUT
    daemon.let_go()
    client.status()
    client.status()  # the queued event may have come before it, the opened one now
    assert daemon.wait_for("cancel")[0].run == 1


def test_what_a_callback_raises_cancels_the_run_and_is_passed_on(daemon: FakeDaemon, client: Client) -> None:
    def callback(step: int, *rest: object) -> None:
        if step == 2:
            raise Stopped

    run = client.open_run(MODEL)
    with pytest.raises(Stopped):
        run.sample(x(), [3.0, 2.0, 1.0, 0.0], "c", callback=callback)
    assert daemon.wait_for("cancel")[0].run == run.id
    client.status()
    assert in_use(client) == 0


def test_an_exception_in_the_with_block_cancels_the_run(daemon: FakeDaemon, client: Client) -> None:
    def work() -> None:
        with client.open_run(MODEL) as run:
            run.put_conditioning("c", {"context": x(1, 5, 4)})
            raise Stopped

    with pytest.raises(Stopped):
        work()
    daemon.wait_for("cancel")
    assert not daemon._of("close")
    client.status()
    assert in_use(client) == 0


def test_a_daemon_that_does_not_answer_is_a_timeout(daemon: FakeDaemon) -> None:
    daemon.hold.add("status")
    with Client(daemon.endpoint, timeout=0.1) as client:
        with pytest.raises(XditError, match=r"Status within 0\.1 s") as failure:
            client.status()
        assert failure.value.code == Code.TIMEOUT
        daemon.let_go()
        assert client.models().models  # the late one is dropped


def test_closing_ends_what_other_threads_wait_for_and_results_stay(
    daemon: FakeDaemon, client: Client
) -> None:
    run = client.open_run(MODEL)
    given = x()
    (result,) = run.denoise([(given, 0.0, "c")])
    daemon.hold |= {"denoise", "status"}
    waiting = [later(run.denoise, [(given, 0.0, "c")]), later(client.status)]
    daemon.wait_for("denoise")
    daemon.wait_for("status")
    client.close()
    for future in waiting:
        with pytest.raises(XditError, match="closed"):
            future.result(10)
    with pytest.raises(XditError, match="make a new Client"):
        client.status()
    assert torch.equal(result, given * 2)
    client.close()


def test_a_forked_child_is_told_to_make_a_client_of_its_own(daemon: FakeDaemon, client: Client) -> None:
    run = client.open_run(MODEL)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        words = []
        for ask in (client.status, lambda: run.put_conditioning("c", {}), lambda: client.epoch):
            try:
                ask()
            except XditError as error:
                words.append(error.message)
        run.close()
        client.close()
        os.write(write, "\n".join(words).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        words = said.read().splitlines()
    assert len(words) == 3
    assert all(f"belongs to process {os.getpid()}" in word for word in words)
    assert client.status().state == "serving"  # the parent's goes on
    run.close()
