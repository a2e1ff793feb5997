"""Where a daemon listens, and where a client looks for one. It knows names and owners, and connects to nothing.

A client takes the endpoint it is given, else `XDITD_ENDPOINT`, else it tries the user's socket and then the
system's. `ipc:///path` is a socket file; `tcp://host:port` another machine. Tensors of an ipc client travel
through shared memory, whose descriptors come by a second socket beside the first, `/path.arena`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from xditd.protocol.errors import Code, XditError

VARIABLE = "XDITD_ENDPOINT"
SYSTEM_PATH = "/run/xditd/xditd.sock"
GROUP = "xditd"
"""The system group whose members may use the system's daemon."""

PERMISSION_DENIED = "permission denied"
NO_SOCKET = "no such socket"
NOBODY_LISTENS = "a socket that nobody listens on"
NO_ANSWER = "no answer"
"""What may come of trying an endpoint."""

_MAX_PATH = 107 - len(".arena")  # sun_path has 108 bytes with its end
_START = "start it with `systemctl --user start xditd` or `xditd serve`"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place where a daemon may listen.

    Attributes:
        address: as ZeroMQ takes it.
        source: who named it, for people: "argument", "XDITD_ENDPOINT", "user's socket", "system's socket".
    """

    address: str
    source: str = "argument"

    @property
    def path(self) -> str | None:
        """The socket file; None for tcp."""
        return self.address[len("ipc://") :] if self.address.startswith("ipc://") else None

    @property
    def arena(self) -> str | None:
        """The socket file that descriptors come by; None for tcp."""
        return None if self.path is None else self.path + ".arena"

    def __str__(self) -> str:
        return f"{self.address} ({self.source})"


def parse(text: str, source: str = "argument") -> Endpoint:
    """An endpoint as a person writes it.

    Raises:
        XditError: `bad_value` for what is neither `ipc:///absolute/path` nor `tcp://host:port`.
    """
    if text.startswith("ipc:///"):
        if len(os.fsencode(text[len("ipc://") :])) > _MAX_PATH:
            raise XditError(
                Code.BAD_VALUE, f"The socket path in {text} is over {_MAX_PATH} bytes; use a shorter one."
            )
        return Endpoint(text, source)
    host, colon, port = text[len("tcp://") :].rpartition(":")
    if (
        text.startswith("tcp://")
        and host
        and colon
        and port.isascii()
        and port.isdigit()
        and int(port) < 65536
    ):
        return Endpoint(text, source)
    raise XditError(
        Code.BAD_VALUE,
        f"{text!r} ({source}) is no endpoint: write ipc:///absolute/path.sock or tcp://host:port.",
    )


def user_path(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> str:
    """The user's own socket: below XDG_RUNTIME_DIR, else in /tmp under the user's number."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return f"{runtime.rstrip('/')}/xditd/xditd.sock"
    return f"/tmp/xditd-{os.getuid() if uid is None else uid}/xditd.sock"


def default_endpoint(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """Where a daemon listens that is told nothing: `XDITD_ENDPOINT`, else its unit's runtime folder, else the user's.

    Raises:
        XditError: `bad_value` for a name that is no endpoint.
    """
    if environ.get(VARIABLE):
        return parse(environ[VARIABLE], VARIABLE)
    folder = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]  # systemd sets it for RuntimeDirectory=
    if folder.startswith("/"):
        return parse(f"ipc://{folder}/xditd.sock", "unit's socket")
    return parse(f"ipc://{user_path(environ)}", "user's socket")


def candidates(explicit: str | None = None, environ: Mapping[str, str] = os.environ) -> list[Endpoint]:
    """Where to look, in order. What is named is the only place; only without a name are there two.

    Raises:
        XditError: `bad_value` for a name that is no endpoint.
    """
    if explicit:
        return [parse(explicit)]
    if environ.get(VARIABLE):
        return [parse(environ[VARIABLE], VARIABLE)]
    return [
        parse(f"ipc://{user_path(environ)}", "user's socket"),
        parse(f"ipc://{SYSTEM_PATH}", "system's socket"),
    ]


def check_owner(endpoint: Endpoint, uid: int | None = None) -> None:
    """Refuses a user's socket in /tmp whose folder another user made: anybody can make folders there.

    Raises:
        XditError: `not_permitted`.
        FileNotFoundError: there is no such folder.
    """
    path = endpoint.path
    if path is None or endpoint.source != "user's socket" or not path.startswith("/tmp/"):
        return
    folder = os.path.dirname(path)
    found = os.lstat(folder)
    ours = os.getuid() if uid is None else uid
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != ours or found.st_mode & 0o022:
        raise XditError(
            Code.NOT_PERMITTED,
            f"{folder} is not a folder that only you can write to, so the daemon in it may be somebody else's. "
            f"Remove it, or name the daemon with {VARIABLE}.",
        )


def not_found(tried: list[tuple[Endpoint, str]]) -> XditError:
    """The error for a search that found no daemon.

    Args:
        tried: each place with what happened there: "no such socket", "permission denied", ...
    """
    places = "; ".join(f"{endpoint}: {outcome}" for endpoint, outcome in tried)
    cures = []
    if any(outcome == PERMISSION_DENIED for _, outcome in tried):
        cures.append(f"join the group {GROUP} (`sudo usermod -aG {GROUP} $USER`, then log in again)")
    if any(outcome in (NO_SOCKET, NOBODY_LISTENS) for _, outcome in tried):
        cures.append(_START)
    if any(outcome == NO_ANSWER for _, outcome in tried):
        cures.append("see that it runs there and that the network lets you through")
    return XditError(
        Code.DAEMON_NOT_FOUND,
        f"No xditd answers. Tried {places}. The cure: {', or '.join(cures) or _START}.",
        tried=[str(endpoint) for endpoint, _ in tried],
    )
