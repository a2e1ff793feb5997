"""A daemon that dies is noticed, named, and replaced: the next request works, a run of the old life says so."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.client.fake_daemon import FakeDaemon
from tests.client.test_client import MODEL, x
from tests.client.threads import later
from tests.handoff.host import descriptors, segments_of
from tests.live.service import wait_for
from xditd.client import Client
from xditd.protocol.errors import Code, XditError


@contextmanager
def killable(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.client.fake_daemon", str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["shared memory", "frames"])
def shared(request: pytest.FixtureRequest) -> bool:
    return request.param == "shared memory"


def test_a_restart_is_noticed_and_survived(tmp_path: Path, shared: bool) -> None:
    path = str(tmp_path / "d")
    with FakeDaemon(path) as old:
        client = Client(old.endpoint, shared_memory=shared)
        run = client.open_run(MODEL)
        (result,) = run.denoise([(torch.ones(1, 4, 4, 4), 0.0, "c")])
    with FakeDaemon(path) as new, client:
        with pytest.raises(XditError, match="Open a new run") as failure:
            run.denoise([(x(), 0.0, "c")])
        assert failure.value.code == Code.RUN_LOST
        assert client.status().epoch == new.epoch == client.epoch != old.epoch
        with pytest.raises(XditError):
            run.put_conditioning("c", {"a": x()})
        run.close()  # nothing to close, and no error
        assert torch.equal(result, torch.full((1, 4, 4, 4), 2.0))
        with client.open_run(MODEL) as again:
            again.denoise([(x(), 0.0, "c")])


def test_a_killed_daemon_fails_what_is_under_way_at_once_in_every_thread(
    tmp_path: Path, shared: bool
) -> None:
    with killable(tmp_path / "d") as process, Client(f"ipc://{tmp_path}/d", shared_memory=shared) as client:
        run = client.open_run(MODEL)
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)  # it may still answer until then
        assert os.WIFSTOPPED(status)
        waiting = [later(client.status) for _ in range(3)]
        waiting.append(later(run.denoise, [(x(), 0.0, "c")]))  # type: ignore[arg-type]
        wait_for(lambda: client._connection and len(client._connection._requests) == 4, "all to be asked")
        begin = time.monotonic()
        process.kill()
        failures = [future.exception(10) for future in waiting]
        assert [failure.code for failure in failures] == [Code.DAEMON_LOST] * 4  # type: ignore[union-attr]
        assert len(set(map(id, failures))) == 4  # each its own: one would gather the frames of all threads
        assert time.monotonic() - begin < 2
        with pytest.raises(XditError) as lost:
            run.denoise([(x(), 0.0, "c")])
        assert lost.value.code == Code.RUN_LOST
        with killable(tmp_path / "d"):
            assert client.status().state == "serving"


def test_a_daemon_that_stays_away_is_not_found(tmp_path: Path, shared: bool) -> None:
    with FakeDaemon(str(tmp_path / "d")) as daemon:
        client = Client(daemon.endpoint, shared_memory=shared, timeout=0.1)
    with client, pytest.raises(XditError) as failure:
        client.status()
    assert failure.value.code == Code.DAEMON_NOT_FOUND
    assert daemon.endpoint in failure.value.message


def test_an_interrupt_ends_the_wait_for_a_daemon_that_stays_away(tmp_path: Path) -> None:
    with FakeDaemon(str(tmp_path / "d")) as daemon:
        client = Client(daemon.endpoint, timeout=60)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with client, pytest.raises(KeyboardInterrupt):
        client.open_run(MODEL, interrupt=interrupt)


def test_the_answer_that_a_daemon_gave_before_it_ended_is_heard(tmp_path: Path, shared: bool) -> None:
    for _ in range(5):
        with (
            FakeDaemon(str(tmp_path / "d")) as daemon,
            Client(daemon.endpoint, shared_memory=shared) as client,
        ):
            client.drain(stop=True)


def test_a_client_that_the_daemon_forgot_for_its_silence_says_hello_again_and_asks_again(
    daemon: FakeDaemon,
) -> None:
    with Client(daemon.endpoint, shared_memory=False) as client:
        run = client.open_run(MODEL)
        daemon.forget_clients()
        assert client.load(MODEL).warm
        assert len(daemon.wait_for("hello")) == 2
        with pytest.raises(XditError) as failure:
            run.denoise([(x(), 0.0, "c")])
        assert failure.value.code == Code.RUN_LOST


def test_a_run_of_a_forgotten_client_is_lost_and_not_asked_twice(daemon: FakeDaemon, client: Client) -> None:
    run = client.open_run(MODEL)
    daemon.forget_clients()
    with pytest.raises(XditError) as failure:
        run.denoise([(x(), 0.0, "c")])
    assert failure.value.code == Code.DAEMON_LOST
    assert len(daemon.wait_for("denoise")) == 1
    with client.open_run(MODEL) as again:
        again.denoise([(x(), 0.0, "c")])


def test_a_client_without_shared_memory_says_goodbye_before_it_closes(tmp_path: Path) -> None:
    with FakeDaemon(str(tmp_path / "d")) as daemon:
        client = Client(daemon.endpoint, shared_memory=False)
        run = client.open_run(MODEL)
        client.close()
        client.close()
        assert len(daemon.wait_for("goodbye")) == 1
        with pytest.raises(XditError, match="run_lost"):
            run.denoise([(x(), 0.0, "c")])


def test_nobody_says_goodbye_to_a_daemon_of_before_there_was_one_nor_where_the_lease_does(
    tmp_path: Path,
) -> None:
    with FakeDaemon(str(tmp_path / "d")) as daemon:
        with Client(daemon.endpoint) as client:
            client.status()
        daemon.wait_gone(1)
        daemon.goodbyes = False
        with Client(daemon.endpoint, shared_memory=False) as client:
            client.status()
        with Client(daemon.endpoint, shared_memory=False) as client:
            client.status()
        assert len(daemon.wait_for("status", 3)) == 3
        assert not daemon._of("goodbye")


def test_over_tcp_everything_works_but_shared_memory(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    daemon = FakeDaemon(str(tmp_path / "d"))
    daemon.endpoint = f"tcp://127.0.0.1:{port}"
    with daemon:
        client = Client(daemon.endpoint)
        with client.open_run(MODEL) as run:
            given = x()
            assert torch.equal(run.denoise([(given, 1.0, "c")])[0], given * 2 + 1)
        run = client.open_run(MODEL)
    with pytest.raises(XditError):
        run.denoise([(x(), 0.0, "c")])
    client.close()


def test_many_lives_of_daemon_and_client_leave_nothing_behind(tmp_path: Path) -> None:
    def life() -> None:
        with FakeDaemon(str(tmp_path / "d")) as daemon:
            for shared in (True, False):
                client = Client(daemon.endpoint, shared_memory=shared)
                with client.open_run(MODEL) as run:
                    run.put_conditioning("c", {"context": x(1, 5, 4)})
                    run.denoise([(x(), 0.0, "c")])
                if shared:
                    client.close()
                    daemon.wait_gone(1)
                del client, run  # the second is never closed
                gc.collect()

    life()
    gc.collect()
    before = (len(descriptors()), segments_of())
    for _ in range(5):
        life()
    gc.collect()
    assert (len(descriptors()), segments_of()) == before
    assert segments_of() == (0, 0)
    assert os.listdir(tmp_path) in ([], ["d"])
