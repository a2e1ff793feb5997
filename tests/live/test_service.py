"""The daemon as a service: ready means ready, the watchdog hears the event loop, logs are for whom they are for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.conftest import Serve
from tests.live.service import Service, wait_for
from xditd.client import Client


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)
        self.path = path

    def hear(self) -> str:
        return self.socket.recv(4096).decode()

    def hear_until(self, start: str) -> list[str]:
        heard = [self.hear()]
        while not heard[-1].startswith(start):
            heard.append(self.hear())
        return heard

    def drain(self) -> None:
        """Takes what was sent before."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.hear()


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    return Systemd(tmp_path / "notify")


def test_ready_means_that_models_to_preload_are_there(serve: Serve, systemd: Systemd) -> None:
    service = serve(
        environment={"NOTIFY_SOCKET": str(systemd.path)},
        **{"models.preload": [{"model": "echo/echo", "devices": ["0"]}]},
    )
    before = systemd.hear_until("READY=1")
    assert any("loading models" in message for message in before)
    with service.client() as client:
        status = client.status()
        assert status.state == "serving"
        (group,) = status.groups
        assert group.state == "ready"
    assert service.stop() == 0
    assert systemd.hear_until("STOPPING=1")


def test_a_model_to_preload_that_is_not_there_is_said_and_the_rest_serves(
    serve: Serve, systemd: Systemd
) -> None:
    service = serve(
        environment={"NOTIFY_SOCKET": str(systemd.path)},
        **{"models.preload": [{"model": "vae/nowhere.safetensors"}]},
    )
    systemd.hear_until("READY=1")
    assert "❌ server: A model to preload is not there: There is no vae/nowhere.safetensors" in service.said()
    assert _wait_ready(service).returncode == 1


def test_wait_ready_is_0_when_the_daemon_serves_with_its_models(serve: Serve) -> None:
    preload = [{"model": "echo/echo", "devices": ["0"]}, {"model": "echo/echo", "devices": ["1"]}]
    service = serve(**{"models.preload": preload})
    assert _wait_ready(service).returncode == 0
    with service.client() as client:
        status = client.status()
        assert [group.state for group in status.groups] == ["ready", "ready"]
        assert [preload.state for preload in status.preloads] == ["ready", "ready"]


def test_wait_ready_is_5_when_the_models_take_too_long(serve: Serve) -> None:
    ranks_that_hang = {"debug.rank_command": ["sleep", "600"]}
    service = serve(**ranks_that_hang, **{"models.preload": [{"model": "echo/echo"}]})
    late = _wait_ready(service, "--timeout", "1.5")
    assert late.returncode == 5
    assert "Not ready in time: the daemon is starting, echo/echo not ready. [timeout]" in late.stderr


def _wait_ready(service: Service, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "xditd.cli.xditctl",
        "wait-ready",
        *options,
        "--endpoint",
        service.endpoint,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_watchdog_hears_nothing_from_an_event_loop_that_stands_still(
    serve: Serve, systemd: Systemd
) -> None:
    service = serve(environment={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "200000"})
    systemd.hear_until("WATCHDOG=1")
    systemd.hear_until("WATCHDOG=1")
    os.kill(service.process.pid, signal.SIGSTOP)
    systemd.drain()
    systemd.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        systemd.hear()
    os.kill(service.process.pid, signal.SIGCONT)
    systemd.socket.settimeout(60)
    systemd.hear_until("WATCHDOG=1")


def test_json_lines_carry_what_they_are_about(serve: Serve) -> None:
    service = serve(**{"log.format": "json"})
    with service.client(name="a program") as client:
        client.load("echo/echo")
    wait_for(lambda: "Disconnected" in service.said(), "the client to be gone")
    assert service.stop() == 0
    lines = [json.loads(line) for line in service.said().splitlines()]
    ready = next(line for line in lines if "is ready after" in line["message"])
    assert (ready["group"], ready["generation"], ready["level"]) == ("g1", 1, "info")
    assert next(line for line in lines if line["message"] == "Connected.")["client"] == "a program"


def test_a_killed_daemon_leaves_a_folder_that_the_next_one_clears(serve: Serve) -> None:
    service = serve()
    service.kill()
    left = {path.name for path in service.folder.iterdir()}
    assert any(name.startswith("ranks-") for name in left)
    second = serve(folder=service.folder)
    assert second.stop() == 0
    assert {path.name for path in service.folder.iterdir()} == {"log"}


def test_a_daemon_that_is_told_nothing_listens_where_the_environment_says(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/own.sock"
    daemon = subprocess.Popen(
        [sys.executable, "-m", "xditd.daemon", "--set=devices.kind=cpu"],
        env={**os.environ, "XDITD_ENDPOINT": endpoint},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with Client(endpoint, timeout=30) as client:
            assert client.status().pid == daemon.pid
    finally:
        daemon.terminate()
        daemon.communicate(timeout=30)


def test_the_environment_cannot_open_a_door_that_the_configuration_keeps_shut() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "xditd.daemon", "--set=devices.kind=cpu"],
        env={**os.environ, "XDITD_ENDPOINT": "tcp://127.0.0.1:39127"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 78
    assert "allow_insecure_tcp" in ended.stderr


def test_a_model_is_unloaded_by_either_name_of_its_kind(serve: Serve) -> None:
    service = serve(**{"devices.cpu_ranks": 1})
    with service.client() as client:
        loaded = client.load("diffusion_models/flux.safetensors")
        assert client.unload("unet/flux.safetensors").groups == (loaded.group,)
