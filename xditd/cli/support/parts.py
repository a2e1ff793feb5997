"""The parts of a bundle: each a name, what it is, and how its text is had. A part that cannot be had says why instead."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from xditd import __version__
from xditd.cli.commands import connect
from xditd.cli.doctor.check import Check
from xditd.cli.doctor.compute import compute_checks
from xditd.cli.doctor.daemon import daemon_checks
from xditd.cli.doctor.host import host_checks
from xditd.cli.events import plain
from xditd.cli.logs import find
from xditd.cli.support import redaction
from xditd.client import Client
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Happened

PACKAGES = (
    "xditd", "torch", "xfuser", "diffusers", "transformers", "triton", "flash-attn", "safetensors", "pyzmq", "msgpack",
    "msgspec", "rich", "click", "psutil", "nvidia-ml-py", "prometheus-client", "numpy", "ray",
)  # fmt: skip

PLACES = ("~/.config/xditd/xditd.toml", "/etc/xditd/xditd.toml")
"""Where a configuration lies that nobody names: systemd/README.md."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a bundle."""

    name: str
    what: str
    make: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a bundle is made of."""

    endpoint: str | None
    config: Path | None
    lines: int
    quick: bool
    unreached: XditError | None = None  # no daemon answers: then nobody waits for it again

    def connect(self) -> Client:
        """A client of the daemon.

        Raises:
            XditError: no daemon answers.
        """
        if self.unreached is not None:
            raise self.unreached
        return connect(self.endpoint, shared_memory=False)


def unreached(endpoint: str | None) -> XditError | None:
    """Why no daemon answers; None where one does."""
    try:
        connect(endpoint, shared_memory=False).close()
    except XditError as error:
        return error
    return None


def parts(wish: Wish) -> list[Part]:
    return [
        Part("versions.json", "versions of xditd, Python, packages, kernel", versions),
        Part("doctor.txt", "what xditctl doctor finds", lambda: doctor(wish.endpoint, wish.quick)),
        Part(
            "status.json",
            "what xditctl status shows, without the labels of runs",
            lambda: status(wish),
        ),
        Part("events.jsonl", "the last events that the daemon has kept", lambda: events(wish)),
        Part("configuration.json", "the configuration, with secrets redacted", lambda: configuration(wish)),
        Part("log.txt", f"the last {wish.lines} lines of the daemon's log", lambda: log(wish)),
        Part("nvidia-smi.txt", "nvidia-smi, and what connects the GPUs", nvidia_smi),
    ]


def versions() -> str:
    there = {name: version for name in PACKAGES if (version := _version(name))}
    return _json(
        {
            "xditd": __version__,
            "python": sys.version,
            "platform": platform.platform(),
            "machine": platform.machine(),
            "packages": there,
        }
    )


def doctor(endpoint: str | None, quick: bool) -> str:
    def checks() -> Iterator[Check]:
        yield from host_checks()
        if not quick:
            yield from compute_checks()
        yield from daemon_checks(endpoint)

    lines = []
    for check in checks():
        lines.append(f"{check.mark.strip()} {check.component}: {check.found}")
        if check.cure:
            lines.append(f"   → {check.cure}")
    return "\n".join(lines) + "\n"


def status(wish: Wish) -> str:
    with wish.connect() as client:
        return _json(redaction.report(msgspec.to_builtins(client.status())))


def events(wish: Wish) -> str:
    """Those that are kept now: the daemon would tell on for ever, so the first quiet moment ends it."""
    told: list[Happened] = []
    seen, end = 0, time.monotonic() + 2.0

    def quiet() -> None:
        nonlocal seen
        if (told and len(told) == seen) or time.monotonic() > end:
            raise _Quiet
        seen = len(told)

    with wish.connect() as client, contextlib.suppress(_Quiet):
        client.watch(told.append, after=0, interrupt=quiet)
    return "".join(msgspec.json.encode(plain(event)).decode() + "\n" for event in told)


class _Quiet(Exception):
    pass


def configuration(wish: Wish) -> str:
    """The file that the daemon was started with, and what its command line sets."""
    path, settings = (wish.config, {}) if wish.config is not None else _of_daemon(wish)
    home = str(Path.home())
    shown: dict[str, Any] = {"file": redaction.text(str(path), home) if path else "none: the defaults"}
    if path is not None:
        written = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
        shown["configuration"] = redaction.configuration(written, home)
    if settings:
        shown["command_line"] = redaction.configuration(settings, home)
    return _json(shown)


def log(wish: Wish) -> str:
    if wish.unreached is not None and wish.endpoint is not None:
        raise wish.unreached
    place = find(wish.endpoint)
    return f"# {place.what}\n" + place.last(wish.lines)


def nvidia_smi() -> str:
    if not shutil.which("nvidia-smi"):
        return "There is no nvidia-smi here.\n"
    said = []
    for arguments in ([], ["topo", "-m"], ["nvlink", "--status"]):
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
        said.append(f"$ {shlex.join(['nvidia-smi', *arguments])}\n{done.stdout}{done.stderr}")
    return "\n".join(said)


def _of_daemon(wish: Wish) -> tuple[Path | None, dict[str, Any]]:
    """The configuration file of the daemon that runs, else the first that lies where it is looked for; and settings."""
    try:
        with wish.connect() as client:
            pid = client.status().pid
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        folder = Path(os.readlink(f"/proc/{pid}/cwd"))
    except (XditError, OSError):
        places = [Path(place).expanduser() for place in PLACES]
        return next((place for place in places if place.is_file()), None), {}
    path: Path | None = None
    settings: dict[str, Any] = {}
    for index, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name not in ("--config", "--set"):
            continue
        if not equals:
            value = command[index + 1] if index + 1 < len(command) else ""
        if name == "--config":
            path = folder / value
        else:
            _put(settings, *value.partition("=")[::2])
    return path, settings


def _put(settings: dict[str, Any], dotted: str, value: str) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        settings = settings.setdefault(table, {})
    settings[key] = value


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _json(plain: Any) -> str:
    return json.dumps(plain, indent=2, ensure_ascii=False, default=str) + "\n"
