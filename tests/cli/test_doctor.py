"""The doctor: what it finds on a machine, and what it says where something lacks."""

from __future__ import annotations

import json
import resource
from importlib import metadata

import pytest
from click.testing import CliRunner

from tests.cli import reports
from xditd.cli import commands
from xditd.cli.doctor import compute, daemon, host, probe
from xditd.cli.doctor.check import version
from xditd.cli.doctor.command import doctor
from xditd.protocol import endpoints
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelList

GOOD = {
    "torch": {"version": "2.13.0+cu126"},
    "xfuser": {"version": "0.7.0"},
    "flash_attn": {"version": "2.8.0"},
    "cuda_build": "12.6",
    "nccl": "2.27.3",
    "gloo": True,
    "devices": [
        {"name": "H200", "capability": "9.0", "memory": 1, "works": True, "peers": [1 - i]} for i in (0, 1)
    ],
}
CPU = GOOD | {"cuda_build": "", "devices": [], "flash_attn": {"error": "ModuleNotFoundError: No module"}}
GPUS = [{"name": "H200", "free": 130 << 30, "total": 140 << 30, "temperature": 40, "power": 120.0}] * 2


def states(checks) -> dict[str, str]:
    return {check.component: check.state for check in checks}


def test_this_machine_can_serve():
    """The tests run where the daemon runs: nothing of the host may have failed."""
    checks = list(host.host_checks())
    assert not [check for check in checks if check.state == "failed"]
    assert {"Python", "shared memory", "file descriptors", "memory"} <= set(states(checks))


def test_two_ranks_meet_here():
    assert compute.judge_world(compute.run_probe("world", 120)).state == "ok"


def test_ranks_that_cannot_meet_are_a_failure_with_a_cure():
    check = compute.judge_world({"error": "RuntimeError: connect timeout"})
    assert (check.state, check.found) == ("failed", "RuntimeError: connect timeout")
    assert "GLOO_SOCKET_IFNAME" in check.cure


def test_a_probe_that_dies_is_an_answer(monkeypatch):
    monkeypatch.setattr(compute.sys, "executable", "/bin/false")
    assert "ended with 1" in compute.run_probe("compute", 10)["error"]


def test_a_machine_with_gpus_in_order():
    checks = [*compute.judge_nvml({"driver": "570.1", "gpus": GPUS}), *compute.judge_compute(GOOD, GPUS)]
    assert set(states(checks).values()) == {"ok"}
    assert {"GPU 0", "GPU 1", "torch", "CUDA", "NCCL", "xfuser", "flash-attn"} <= set(states(checks))


def test_a_machine_without_a_gpu_is_warned_and_serves():
    checks = [
        *compute.judge_nvml({"error": "NVML Shared Library Not Found"}),
        *compute.judge_compute(CPU, []),
    ]
    assert states(checks) == {"NVIDIA driver": "warning", "torch": "ok", "xfuser": "ok", "flash-attn": "ok"}


@pytest.mark.parametrize(
    ("changes", "component", "state", "words"),
    [
        ({"torch": {"version": "2.5.1"}}, "torch", "failed", "2.6 or newer"),
        ({"torch": {"error": "ImportError: libcudart"}}, "torch", "failed", "xditd[daemon]"),
        ({"error": "ended with -11: nothing said"}, "torch", "failed", "xditd[daemon]"),
        ({"xfuser": {"version": "0.8.0"}}, "xfuser", "failed", "xfuser==0.7.0"),
        ({"xfuser": {"error": "not installed"}}, "xfuser", "failed", "xditd[daemon]"),
        ({"flash_attn": {"error": "ModuleNotFoundError: x"}}, "flash-attn", "warning", "slightly slower"),
        ({"cuda_build": "", "devices": []}, "CUDA", "failed", "CUDA build"),
        ({"devices": []}, "CUDA", "failed", "driver"),
        ({"nccl": ""}, "NCCL", "failed", "xditd[daemon]"),
        ({"devices": [d | {"peers": []} for d in GOOD["devices"]]}, "NCCL", "warning", "slower"),
        ({"devices": [d | {"works": False} for d in GOOD["devices"]]}, "CUDA", "failed", "nvidia-smi"),
    ],
)
def test_what_lacks_for_computing_comes_with_its_cure(changes, component, state, words):
    found = {check.component: check for check in compute.judge_compute(GOOD | changes, GPUS)}
    assert found[component].state == state
    assert words in found[component].cure


@pytest.mark.parametrize(
    ("changes", "words"), [({"temperature": 91}, "cooling"), ({"free": 1 << 30}, "nvidia-smi")]
)
def test_a_hot_or_full_gpu_is_a_warning(changes, words):
    (_, check) = compute.judge_nvml({"driver": "570.1", "gpus": [GPUS[0] | changes]})
    assert check.state == "warning"
    assert words in check.cure


def test_packages_are_held_against_what_pyproject_asks_for(monkeypatch):
    asked = ["present>=2", "old>=3", "pinned==0.7.0", "gone", "later; python_version < '3.9'"]
    there = {"present": "2.1", "old": "2.9", "pinned": "0.7.1"}

    def look(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(host.metadata, "version", look)
    check = host._packages("packages", asked, "pip install xditd")
    assert check.state == "failed"
    assert check.found == "old is 2.9, needed is >= 3; pinned is 0.7.1, needed is == 0.7.0; gone is missing"


def test_a_module_that_does_not_tell_its_version_is_asked_by_its_installation(tmp_path, monkeypatch):
    """As xfuser does not: its GPU check once failed with no reason on every machine that had one."""
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "__init__.py").write_text("")
    (tmp_path / "silent-1.2.dist-info").mkdir()
    (tmp_path / "silent-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: silent\nVersion: 1.2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert probe._version("silent") == {"version": "1.2"}
    assert probe._version("msgspec") == {"version": metadata.version("msgspec")}
    assert probe._version("nowhere") == {"error": "ModuleNotFoundError: No module named 'nowhere'"}


def test_versions_compare_as_numbers():
    assert version("2.13.0+cpu") == (2, 13, 0)
    assert host.satisfies("2.13.0+cpu", ">=", "2.6")
    assert not host.satisfies("0.7.0.post1", "==", "0.7.1")
    assert host.satisfies("0.7", "==", "0.7.0")


def test_no_room_for_segments_and_descriptors_is_a_failure(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host.os, "posix_fallocate", refuse)
    assert host.shared_memory().state == "failed"
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (256, 256))
    assert host.descriptors().state == "failed"
    assert "LimitNOFILE" in host.descriptors().cure
    assert host.locked_memory().state == "warning"
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert host.locked_memory().state == "ok"


# -------------------------------------------------------------------------------------------------- the daemon


def test_a_daemon_is_judged_by_its_report():
    assert daemon.judge_status(reports.empty_report()).state == "ok"
    broken = daemon.judge_status(reports.report())
    assert broken.state == "warning"
    assert "ran out of memory" in broken.cure
    assert "upgrade" in daemon.judge_status(reports.empty_report(version="9.9")).cure
    assert daemon.judge_status(reports.empty_report(state="draining")).state == "warning"


def test_models_are_judged_by_what_is_seen():
    assert daemon.judge_models(ModelList(re=1, models=())).state == "failed"
    assert daemon.judge_models(ModelList(re=1, models=(), roots=("/x",))).state == "warning"
    assert "1 file skipped" in daemon.judge_models(reports.models()).found


def test_sockets_are_judged_by_who_may_use_them(tmp_path):
    place = endpoints.Endpoint(f"ipc://{tmp_path}/a/xditd.sock", "user's socket")
    assert [check.state for check in daemon.socket(place)] == ["ok"]
    assert "can be made" in next(iter(daemon.socket(place))).found
    assert list(daemon.socket(endpoints.Endpoint(f"ipc://{tmp_path}/no.sock", "system's socket"))) == []
    (tmp_path / "no.sock").touch()
    assert "no.sock" in next(iter(daemon.socket(endpoints.Endpoint(f"ipc://{tmp_path}/no.sock")))).found


def run(*line: str, error: XditError, monkeypatch):
    def connect(*_, **__):
        raise error

    monkeypatch.setattr(commands, "Client", connect)
    return CliRunner().invoke(doctor, ["--quick", *line], catch_exceptions=False)


def test_no_daemon_is_a_warning_for_the_doctor(monkeypatch):
    result = run(error=XditError(Code.DAEMON_NOT_FOUND, "No xditd answers."), monkeypatch=monkeypatch)
    assert result.exit_code == 0
    assert "none answers" in result.output
    assert "→ Start one" in result.output
    assert "no failures" in result.output


def test_a_failure_is_status_1_and_in_the_json(monkeypatch):
    error = XditError(Code.UNSUPPORTED_VERSION, "The daemon speaks 2 to 3.")
    result = run("--json", error=error, monkeypatch=monkeypatch)
    assert result.exit_code == 1
    found = {check["component"]: check for check in json.loads(result.output)}
    assert found["daemon"]["state"] == "failed"
    assert found["Python"]["state"] == "ok"
