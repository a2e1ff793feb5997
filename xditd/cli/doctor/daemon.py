"""Checks of the way to a daemon, the daemon, and the models that it sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xditd import __version__
from xditd.cli import words
from xditd.cli.commands import connect
from xditd.cli.doctor.check import Check, failed, ok, warning
from xditd.protocol import endpoints
from xditd.protocol.errors import Code, XditError
from xditd.protocol.figures import NurseryStatus
from xditd.protocol.messages import ModelList, StatusReport


def daemon_checks(endpoint: str | None) -> Iterator[Check]:
    try:
        places = endpoints.candidates(endpoint)
    except XditError as error:
        yield failed("endpoint", error.message, "Write ipc:///path or tcp://host:port.")
        return
    yield from (check for place in places for check in socket(place))
    try:
        with connect(endpoint, shared_memory=False, timeout=3.0) as client:
            report = client.status()
            yield judge_status(report)
            if report.nursery is not None:
                yield judge_nursery(report.nursery)
            yield judge_models(client.models())
    except XditError as error:
        if error.code is Code.DAEMON_NOT_FOUND:
            yield warning(
                "daemon", "none answers", "Start one: `systemctl --user start xditd` or `xditd serve`."
            )
        else:
            yield failed(
                "daemon", error.message, "Its log says more: `journalctl -u xditd` or `--user-unit xditd`."
            )


def socket(place: endpoints.Endpoint) -> Iterator[Check]:
    """Whether this user may use the socket, or make it."""
    if place.path is None:
        return
    path = Path(place.path)
    try:
        endpoints.check_owner(place)
        there = path.exists()
    except FileNotFoundError:
        there = False
    except PermissionError:
        yield _closed(place)
        return
    except XditError as error:
        yield failed(place.source, error.message, f"Remove {path.parent}.")
        return
    if there and not os.access(path, os.R_OK | os.W_OK):
        yield _closed(place)
    elif there:
        yield ok(place.source, str(path))
    elif place.source == "user's socket":
        folder = next(parent for parent in path.parents if parent.exists())
        if os.access(folder, os.W_OK):
            yield ok(place.source, f"{path}: not there yet, can be made")
        else:
            yield failed(
                place.source, f"{folder} is not writable", "Set XDG_RUNTIME_DIR to a folder of yours."
            )


def _closed(place: endpoints.Endpoint) -> Check:
    group = endpoints.GROUP
    return warning(
        place.source, f"{place.path} is closed to you", f"sudo usermod -aG {group} $USER, then log in again."
    )


def judge_status(report: StatusReport) -> Check:
    devices = ", ".join(device.name for device in report.devices)
    found = f"{report.version}, {report.state}, pid {report.pid}, with {devices or 'no device'}"
    broken = [group for group in report.groups if group.problem]
    if broken:
        return warning("daemon", found, f"{words.model(broken[0].model)}: {broken[0].problem}")
    if report.version != __version__:
        return warning(
            "daemon", found, f"This xditctl is {__version__}: restart the daemon after an upgrade."
        )
    if report.state != "serving":
        return warning("daemon", found, "It takes no new runs in this state.")
    return ok("daemon", found)


def judge_nursery(nursery: NurseryStatus) -> Check:
    """How ranks start."""
    if nursery.state == "ended":
        return warning(
            "start of ranks",
            f"slow: the nursery ended. {nursery.problem}.",
            "Restart the daemon when it may be.",
        )
    if nursery.state == "off":
        return ok("start of ranks", "each imports by itself; the nursery is off")
    if nursery.seconds is None:
        return ok("start of ranks", f"forked by the nursery, pid {nursery.pid}, which still imports")
    took = words.duration(nursery.seconds)
    return ok("start of ranks", f"forked by the nursery, pid {nursery.pid}, whose imports took {took}")


def judge_models(answer: ModelList) -> Check:
    found = f"{words.plural(len(answer.models), 'model')} in {words.plural(len(answer.roots), 'folder')}"
    if not answer.roots:
        return failed(
            "models", "no folder is configured", "Set [models] comfyui, or `xditd serve --models FOLDER`."
        )
    if not answer.models:
        return warning(
            "models", found, "`xditctl models` says why files were skipped; the daemon's user must see them."
        )
    if answer.skipped:
        cure = "`xditctl models` says why."
        return warning("models", f"{found}; {words.plural(len(answer.skipped), 'file')} skipped", cure)
    return ok("models", found)
