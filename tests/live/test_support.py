"""`xditctl logs` and `xditctl support-bundle` beside a real daemon, and without one."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO

import torch

from tests.live.conftest import Serve
from xditd.protocol.messages import PlanRequest

CTL = [sys.executable, "-m", "xditd.cli.xditctl"]
X = torch.zeros(1, 16, 4, 4)


def run(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CTL, *line], capture_output=True, text=True, timeout=120)


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        files = {Path(entry.name).name: tar.extractfile(entry).read().decode() for entry in tar}
        assert len({Path(entry.name).parent for entry in tar}) == 1, "one folder, named as the file"
    return files


def test_logs_finds_the_file_and_says_so(serve: Serve) -> None:
    service = serve()
    shown = run("logs", "-n", "1000", "--endpoint", service.endpoint)
    assert shown.returncode == 0
    assert (
        f"Looking at {service.log}, the standard error of the daemon (pid {service.process.pid})"
        in shown.stderr
    )
    said = service.said()
    assert "Serving on" in shown.stdout
    assert said.startswith(shown.stdout)
    # The daemon may hear of the goodbye of whoever asked a moment after its log was read.
    assert all("Said goodbye" in line for line in said[len(shown.stdout) :].splitlines())


def test_logs_follows_what_comes(serve: Serve) -> None:
    service = serve()
    command = [*CTL, "logs", "--follow", "--endpoint", service.endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as following:
        until(following.stdout, "Serving on")  # it has begun
        with service.client(name="somebody new"):
            until(following.stdout, "somebody new")
        following.kill()


def until(lines: IO[str], word: str) -> None:
    assert any(word in line for line in lines), f"the lines ended without {word}"


def test_logs_without_a_daemon_is_3(tmp_path: Path) -> None:
    shown = run("logs", "--endpoint", f"ipc://{tmp_path}/nobody.sock")
    assert shown.returncode == 3
    (tmp_path / "log").write_text("a line\n")
    shown = run("logs", "--file", str(tmp_path / "log"))
    assert (shown.returncode, shown.stdout) == (0, "a line\n")


def test_a_bundle_has_what_helps_and_no_secret_label_or_key(serve: Serve, tmp_path: Path) -> None:
    service = serve(**{"debug.rank_options": {"note": "rank-secret-9"}})
    config, path = tmp_path / "xditd.toml", tmp_path / "bundle.tar.gz"
    config.write_text('[log]\nlevel = "debug"\n[future]\nkey = "config-secret-9"  # comment-secret-9\n')
    one, key = PlanRequest(devices=("0",)), "a prompt of a fox"
    with service.client(name="a program") as client, client.open_run("echo/echo", one, label=key) as open_run:
        open_run.put_conditioning(key, {"context": X})
        open_run.denoise([(X, (1.0,), key)])
        chosen = ["-o", str(path), "--config", str(config), "--endpoint", service.endpoint]
        done = run("support-bundle", "--quick", *chosen)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    files = unpacked(path)
    assert set(files) == {
        "versions.json", "doctor.txt", "status.json", "events.jsonl", "configuration.json", "log.txt", "nvidia-smi.txt",
    }  # fmt: skip
    for name in files:
        assert name in done.stdout, "what is in it is said"
    assert "Python" in files["doctor.txt"]
    status = json.loads(files["status.json"])
    assert status["state"] == "serving"
    assert status["runs"][0]["label"] == "<17 characters>"
    events = [json.loads(line)["event"] for line in files["events.jsonl"].splitlines()]
    assert {"serving", "group_ready", "run_opened"} <= set(events)
    assert json.loads(files["versions.json"])["packages"]["pyzmq"]
    assert json.loads(files["configuration.json"])["configuration"]["log"] == {"level": "debug"}
    assert "Serving on" in files["log.txt"]
    everything = "".join(files.values())
    for secret in ("fox", "rank-secret-9", "config-secret-9", "comment-secret-9"):
        assert secret not in everything, secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir() if "bundle" in entry.name] == ["bundle.tar.gz"]


def test_the_configuration_is_that_of_the_daemon_that_runs(serve: Serve, tmp_path: Path) -> None:
    service = serve(**{"debug.rank_options": {"note": "rank-secret-9"}})
    path = tmp_path / "bundle.tar.gz"
    done = run("support-bundle", "--quick", "--json", "-o", str(path), "--endpoint", service.endpoint)
    assert {one["name"]: one["problem"] for one in json.loads(done.stdout)["contents"]}["log.txt"] == ""
    shown = json.loads(unpacked(path)["configuration.json"])["command_line"]
    assert shown["devices"]["kind"] == '"cpu"'
    assert shown["debug"]["rank_options"] == "<redacted>"


def test_a_bundle_without_a_daemon_says_what_could_not_be_had(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    done = run("support-bundle", "--quick", "-o", str(path), "--endpoint", f"ipc://{tmp_path}/nobody.sock")
    assert done.returncode == 0, done.stderr
    files = unpacked(path)
    assert files["status.json"].startswith("could not be had: No xditd answers")
    assert "Python" in files["doctor.txt"]
    done = run("support-bundle", "--quick", "-o", str(tmp_path / "no" / "folder.tar.gz"))
    assert done.returncode == 4
    assert "cannot be written" in done.stderr
