"""Where a client looks for its daemon, in which order, and what it says when there is none."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.client.fake_daemon import FakeDaemon
from tests.client.threads import later
from xditd.client import Client, search
from xditd.protocol import endpoints
from xditd.protocol.endpoints import Endpoint, candidates, parse
from xditd.protocol.errors import Code, XditError


def addresses(explicit: str | None, environ: dict[str, str]) -> list[str]:
    return [endpoint.address for endpoint in candidates(explicit, environ)]


def test_what_is_named_is_the_only_place_and_an_argument_comes_before_the_environment() -> None:
    environ = {"XDITD_ENDPOINT": "ipc:///b", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert addresses("tcp://gpu:5555", environ) == ["tcp://gpu:5555"]
    assert addresses(None, environ) == ["ipc:///b"]


def test_without_a_name_the_users_socket_comes_before_the_systems() -> None:
    assert addresses(None, {"XDG_RUNTIME_DIR": "/run/user/7"}) == [
        "ipc:///run/user/7/xditd/xditd.sock",
        "ipc:///run/xditd/xditd.sock",
    ]
    assert addresses(None, {})[0] == f"ipc:///tmp/xditd-{os.getuid()}/xditd.sock"


def test_a_daemon_listens_where_its_clients_look() -> None:
    def listens(**environ: str) -> str:
        return endpoints.default_endpoint(environ).address

    assert listens(XDITD_ENDPOINT="ipc:///b", RUNTIME_DIRECTORY="/r") == "ipc:///b"
    assert listens(RUNTIME_DIRECTORY="/run/xditd") == f"ipc://{endpoints.SYSTEM_PATH}"
    assert [listens(XDG_RUNTIME_DIR="/run/user/7")] == addresses(None, {"XDG_RUNTIME_DIR": "/run/user/7"})[:1]


def test_the_arena_socket_is_beside_an_ipc_socket_and_tcp_has_none() -> None:
    assert parse("ipc:///p/xditd.sock").arena == "/p/xditd.sock.arena"
    assert parse("tcp://h:1").arena is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/p",
        "ipc://p",
        "ipc://@abstract",
        "tcp://host",
        "tcp://:1",
        "tcp://h:99999",
        "tcp://h:1x",
        "http://h:1",
        "ipc:///" + "x" * 101,
    ],
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(XditError) as refusal:
        parse(text)
    assert refusal.value.code == Code.BAD_VALUE


def test_a_folder_in_tmp_that_another_could_have_made_is_not_trusted(tmp_path: Path) -> None:
    folder = Path(f"/tmp/xditd-test-{os.getpid()}")
    ours = Endpoint(f"ipc://{folder}/xditd.sock", "user's socket")
    with pytest.raises(FileNotFoundError):
        endpoints.check_owner(ours)
    folder.mkdir(mode=0o700)
    try:
        endpoints.check_owner(ours)
        for spoil in (lambda: folder.chmod(0o777), lambda: os.chown(folder, os.getuid() + 1, -1)):
            if os.getuid() and spoil.__code__.co_names[0] == "os":
                continue  # only root can give a folder away
            spoil()
            with pytest.raises(XditError) as refusal:
                endpoints.check_owner(ours)
            assert refusal.value.code == Code.NOT_PERMITTED
            folder.chmod(0o700)
        folder.rmdir()
        folder.symlink_to(tmp_path)
        with pytest.raises(XditError):
            endpoints.check_owner(ours)
    finally:
        folder.unlink() if folder.is_symlink() else folder.rmdir()


def test_without_any_daemon_every_place_and_the_cure_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("XDITD_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(endpoints, "SYSTEM_PATH", str(tmp_path / "system.sock"))
    with pytest.raises(XditError) as failure:
        Client(timeout=0)
    assert failure.value.code == Code.DAEMON_NOT_FOUND
    for part in (
        str(tmp_path / "xditd/xditd.sock"),
        str(tmp_path / "system.sock"),
        "xditd serve",
        "no such socket",
    ):
        assert part in failure.value.message


def test_the_systems_daemon_is_found_where_the_user_has_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("XDITD_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(endpoints, "SYSTEM_PATH", str(tmp_path / "s"))
    with FakeDaemon(str(tmp_path / "s")) as daemon, Client(timeout=0) as client:
        assert client.epoch == daemon.epoch
        assert client.endpoint == daemon.endpoint


def test_a_socket_that_nobody_listens_on_is_told_from_none(tmp_path: Path) -> None:
    for kind, name in ((socket.SOCK_STREAM, "d"), (socket.SOCK_SEQPACKET, "d.arena")):
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(str(tmp_path / name))
    with pytest.raises(XditError, match="nobody listens"):
        Client(f"ipc://{tmp_path}/d", timeout=0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_socket_that_is_not_for_us_names_the_group_at_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with FakeDaemon(f"{folder}/d") as daemon:
            os.chmod(f"{folder}/d", 0o660)
            os.setegid(65534)
            os.seteuid(65534)
            begin = time.monotonic()
            try:
                with pytest.raises(XditError, match="usermod -aG xditd") as failure:
                    Client(daemon.endpoint, timeout=60)
            finally:
                os.seteuid(0)
                os.setegid(0)
            assert failure.value.code == Code.DAEMON_NOT_FOUND
            assert time.monotonic() - begin < 30  # waiting would not have helped


def test_a_client_waits_for_a_daemon_that_is_about_to_start(tmp_path: Path, monkeypatch) -> None:
    tried, knock = threading.Event(), search._knock

    def knocks(*arguments: Any) -> None:
        tried.set()
        knock(*arguments)

    monkeypatch.setattr(search, "_knock", knocks)
    waiting = later(Client, f"ipc://{tmp_path}/d", timeout=20)
    assert tried.wait(10)
    with FakeDaemon(str(tmp_path / "d")) as daemon, waiting.result(20) as client:
        assert client.epoch == daemon.epoch


def test_tcp_without_a_daemon_is_not_found(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(XditError, match="no answer") as failure:
        Client(f"tcp://127.0.0.1:{port}", timeout=0)
    assert failure.value.code == Code.DAEMON_NOT_FOUND


def test_another_protocol_version_is_passed_on(tmp_path: Path) -> None:
    with FakeDaemon(str(tmp_path / "d"), version=9) as daemon, pytest.raises(XditError) as refusal:
        Client(daemon.endpoint)
    assert refusal.value.code == Code.UNSUPPORTED_VERSION
