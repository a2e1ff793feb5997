"""The daemon's folder: its endpoint, its lock, and a folder for its ranks. One daemon per endpoint; nothing is left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from xditd.daemon.config import Config, check_endpoint
from xditd.protocol import endpoints
from xditd.protocol.errors import Code, XditError


def endpoint_of(config: Config) -> endpoints.Endpoint:
    """Where this daemon listens: as configured, or where one listens that is told nothing.

    Raises:
        XditError: `bad_config` where the environment names what the configuration does not allow.
    """
    if config.endpoint:
        return endpoints.parse(config.endpoint, "configuration")
    endpoint = endpoints.default_endpoint()
    try:
        check_endpoint(endpoint.address, allow_tcp=config.allow_insecure_tcp)
    except ValueError as error:
        raise XditError(Code.BAD_CONFIG, f"{endpoint.source}: {error}.") from error
    return endpoint


class Home:
    """Held while the daemon lives, as a context manager.

    Attributes:
        runtime: a folder of this daemon alone: the ranks' socket and rendezvous files.
    """

    runtime: Path
    _lock_file: Path

    def __init__(self, config: Config, endpoint: endpoints.Endpoint) -> None:
        self.endpoint = endpoint
        self._socket = Path(endpoint.path) if endpoint.path is not None else None
        beside = self._socket.parent if self._socket else Path(endpoints.user_path()).parent
        self._folder = Path(config.runtime_dir) if config.runtime_dir else beside
        self._lock = -1

    def __enter__(self) -> Home:
        """
        Raises:
            XditError: `bad_config` for a folder that cannot be used, `already_running` where another daemon holds
                the endpoint.
        """
        try:
            for folder in {self._folder, self._socket.parent if self._socket else self._folder}:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            endpoints.check_owner(self.endpoint)
            name = self._socket.name if self._socket else self.endpoint.address.rpartition(":")[2]
            where = self._socket.parent if self._socket else self._folder
            self._take_lock(where / f"{name}.lock")
            self.runtime = Path(tempfile.mkdtemp(prefix=f"ranks-{os.getpid()}-", dir=self._folder))
        except OSError as error:
            raise XditError(
                Code.BAD_CONFIG,
                f"The daemon's folder {self._folder} cannot be used: {error.strerror}; name another (runtime_dir).",
            ) from error
        if len(os.fsencode(self.runtime / "ranks.sock")) > 107:
            shutil.rmtree(self.runtime)
            raise XditError(
                Code.BAD_CONFIG,
                f"The path {self._folder} is too long for a Unix socket; name a shorter runtime_dir.",
            )
        for stale in self._folder.glob("ranks-*"):
            if stale != self.runtime and not _alive(stale):
                shutil.rmtree(stale, ignore_errors=True)  # of a daemon that was killed
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.runtime, ignore_errors=True)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)  # while it is held: whoever waits for it looks again
        os.close(self._lock)

    def _take_lock(self, path: Path) -> None:
        """A second bind on a live ipc path would succeed and steal every client: so a lock comes first."""
        self._lock_file = path
        while True:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._lock)
                raise XditError(
                    Code.ALREADY_RUNNING,
                    f"Another daemon (pid {pid}) serves {self.endpoint.address}; stop it first, or choose another "
                    "endpoint.",
                ) from None
            if path.exists() and os.path.samestat(os.fstat(self._lock), path.stat()):
                break
            os.close(self._lock)  # of a daemon that has just ended, and took its file along
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)


def _alive(runtime: Path) -> bool:
    """Whether the daemon that made a runtime folder, ranks-PID-…, still lives."""
    try:
        os.kill(int(runtime.name.split("-")[1]), 0)
    except (OSError, ValueError):
        return False
    return True
