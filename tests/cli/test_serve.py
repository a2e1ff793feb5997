"""`xditd serve`: a command line that becomes the daemon's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from xditd.cli import xditd
from xditd.daemon.config import Config, load_config


@pytest.fixture
def became(monkeypatch):
    """The arguments that `serve` would become the daemon with."""
    taken: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: taken.append(arguments))

    def run(*line: str) -> list[str]:
        result = CliRunner().invoke(xditd.main, ["serve", *line], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return taken.pop()

    return run


def config_of(arguments: list[str]) -> Config:
    """What the daemon makes of them."""
    import msgspec

    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    return load_config(
        None, {key: msgspec.toml.decode(f"x = {value}")["x"] for key, value in settings.items()}
    )


def test_it_becomes_the_daemon_in_the_same_process(became):
    assert became() == [sys.executable, "-m", "xditd.daemon"]
    assert became("--config", "x.toml")[3:] == ["--config", "x.toml"]


def test_options_are_keys_of_the_configuration(became):
    arguments = became(
        "--endpoint", "ipc:///tmp/x.sock", "--cpu-ranks", "3", "--log-format", "json", "--log-level", "debug",
        "--set", "deadlines.turn=60",
    )  # fmt: skip
    config = config_of(arguments)
    assert config.endpoint == "ipc:///tmp/x.sock"
    assert (config.devices.kind, config.devices.cpu_ranks) == ("cpu", 3)
    assert (config.log.format, config.log.level) == ("json", "debug")
    assert config.deadlines.turn == 60


def test_a_comfyui_folder_is_known_by_its_models(became, tmp_path):
    (tmp_path / "models").mkdir()
    assert config_of(became("--models", str(tmp_path))).models.comfyui == str(tmp_path)


def test_a_models_folder_is_known_by_its_kinds(became, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "diffusion_models").mkdir()
    assert config_of(became("--models", str(tmp_path))).models.folders == {
        "diffusion_models": (str(tmp_path / "diffusion_models"),),
        "vae": (str(tmp_path / "vae"),),
    }


def test_a_folder_without_models_is_refused(tmp_path):
    result = CliRunner().invoke(xditd.main, ["serve", "--models", str(tmp_path)])
    assert result.exit_code == 2
    assert "neither models/ nor any of" in result.output


def test_a_wrong_configuration_ends_with_78_and_one_line(tmp_path):
    """The real daemon: systemd takes the status for "do not try again"."""
    path = tmp_path / "xditd.toml"
    path.write_text("[devices]\ncpu_rnks = 2\n")
    command = [sys.executable, "-m", "xditd.cli.xditd", "serve", "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 78
    assert "did you mean devices.cpu_ranks?" in result.stderr
    assert "Traceback" not in result.stderr
