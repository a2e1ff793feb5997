"""What systemd hears from the daemon, and whether it accepts the units."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from xditd.daemon.systemd import Notifier

SYSTEMD = Path(__file__).parents[2] / "systemd"


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A service manager's socket, and the address that it would hand out."""
    address = (
        str(tmp_path / "notify") if request.param == "path" else f"@xditd-test-{os.getpid()}-{id(request)}"
    )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind("\0" + address[1:] if address.startswith("@") else address)
    listener.settimeout(10)
    with listener:
        yield listener, address


def heard(listener: socket.socket) -> list[str]:
    return listener.recv(4096).decode().split("\n")


def test_a_life_from_ready_to_stopping(manager):
    listener, address = manager
    notifier = Notifier(address)
    notifier.ready("2 devices, no model")
    assert heard(listener) == ["READY=1", "STATUS=2 devices, no model"]
    notifier.status("1 group,\nMAINPID=1")
    assert heard(listener) == ["STATUS=1 group, MAINPID=1"], "a line break must not begin another variable"
    notifier.stopping("ending 1 run")
    assert heard(listener) == ["STOPPING=1", "STATUS=ending 1 run"]
    notifier.close()


def test_the_watchdog_is_fed_at_half_its_interval_while_the_loop_turns(manager):
    listener, address = manager
    listener.setblocking(False)

    async def story() -> list[bytes]:
        loop = asyncio.get_running_loop()
        watchdog = asyncio.create_task(Notifier(address, watchdog=0.1).keep_watchdog())
        begin = loop.time()
        said = [await loop.sock_recv(listener, 64) for _ in range(4)]
        assert 0.1 < loop.time() - begin < 5
        watchdog.cancel()
        return said

    assert asyncio.run(story()) == [b"WATCHDOG=1"] * 4


def test_a_loop_that_hangs_feeds_no_watchdog(manager):
    listener, address = manager

    async def story() -> None:
        watchdog = asyncio.create_task(Notifier(address, watchdog=0.02).keep_watchdog())
        await asyncio.sleep(0)
        assert await asyncio.to_thread(heard, listener) == ["WATCHDOG=1"]
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):  # the receive blocks the loop for ten intervals
            all(heard(listener) for _ in range(1000))
        watchdog.cancel()

    asyncio.run(story())


def test_without_a_watchdog_the_task_ends_at_once(manager):
    asyncio.run(asyncio.wait_for(Notifier(manager[1]).keep_watchdog(), 5))


def test_the_variables_are_taken_so_that_ranks_do_not_inherit_them():
    environ = {
        "NOTIFY_SOCKET": "@x",
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    notifier = Notifier.from_environment(environ)
    assert (notifier.address, notifier.watchdog) == ("@x", 30.0)
    assert environ == {"HOME": "/"}


def test_a_watchdog_meant_for_another_process_is_not_ours():
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environ).watchdog == 0.0


def test_without_systemd_nothing_happens():
    notifier = Notifier.from_environment({})
    notifier.ready("x")
    notifier.stopping("x")
    notifier.close()
    assert not notifier.watchdog


def test_a_manager_that_is_gone_is_logged_and_survived(tmp_path, caplog):
    Notifier(str(tmp_path / "gone")).ready("x")
    assert "systemd could not be told READY=1" in caplog.text


# ---------------------------------------------------------------------------------------------------- the units


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize(("unit", "mode"), [("xditd.service", "--system"), ("user/xditd.service", "--user")])
def test_systemd_accepts_the_unit(unit, mode, tmp_path):
    """With an ExecStart that exists here; the real one exists where the unit is installed."""
    text, replaced = re.subn(
        r"^ExecStart=\S+", "ExecStart=/bin/true", (SYSTEMD / unit).read_text(), flags=re.M
    )
    assert replaced == 1
    copy = tmp_path / "xditd.service"
    copy.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", mode, str(copy)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="no systemd-sysusers here")
def test_systemd_would_create_the_user():
    command = ["systemd-sysusers", "--dry-run", str(SYSTEMD / "sysusers.d/xditd.conf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("unit", ["xditd.service", "user/xditd.service"])
def test_the_unit_says_what_the_daemon_relies_on(unit):
    said = dict(
        line.split("=", 1)
        for line in (SYSTEMD / unit).read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert said["Type"] == "notify"
    assert said["NotifyAccess"] == "main"
    assert float(said["WatchdogSec"]) > 0
    assert said["KillMode"] == "mixed"
    assert said["Restart"] == "on-failure"
    assert said["RestartPreventExitStatus"] == "78"
    assert said["OOMPolicy"] == "continue"
    assert said["ExecStart"].split()[1] == "serve"
