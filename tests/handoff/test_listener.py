"""The arena socket: who may connect, what lies at its path, and what a lack of descriptors does to it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.handoff.host import Host, lease
from xditd.handoff.lease import Lease
from xditd.protocol.errors import Code, XditError


def test_only_the_user_and_the_group_may_connect(host: Host) -> None:
    found = os.stat(host.path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o660


def test_a_stale_socket_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(tmp_path / "a.sock"))
    stale.close()
    with Host(tmp_path / "a.sock") as host:
        lease(host).close()
    assert not (tmp_path / "a.sock").exists()

    precious = tmp_path / "b.sock"
    precious.write_text("not a socket")
    with pytest.raises(XditError) as refusal:
        Host(precious)._run()
    assert refusal.value.code == Code.BAD_CONFIG
    assert precious.read_text() == "not a socket"


def test_a_daemon_out_of_descriptors_refuses_clients_and_serves_again_when_some_go(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.handoff.host", path, "40"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        clients: list[Lease] = []
        refusals: list[XditError] = []
        while len(refusals) < 5:
            try:
                clients.append(Lease(path, 10))
            except XditError as refusal:
                refusals.append(refusal)
        assert 5 < len(clients) < 20
        assert {refusal.code for refusal in refusals} == {Code.ARENA_EXHAUSTED}
        for client in clients:
            client.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                Lease(path, 10).close()
                break
            except XditError:
                assert time.monotonic() < deadline
        assert process.poll() is None
        process.communicate("", timeout=10)
    assert process.returncode == 0
