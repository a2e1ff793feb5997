"""Checks of the machine and this Python: packages, kernel, shared memory, limits, room. No torch, no daemon."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata

import psutil

from xditd.cli import words
from xditd.cli.doctor.check import Check, failed, ok, version, warning

GIB = 1 << 30


def host_checks() -> Iterator[Check]:
    yield python()
    yield from packages()
    yield kernel()
    yield shared_memory()
    yield descriptors()
    yield locked_memory()
    yield memory()
    yield disk()


def python() -> Check:
    """An older one than xditd asks for could not have read this file."""
    return ok("Python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def packages() -> Iterator[Check]:
    """What pyproject.toml asks for, held against what is installed."""
    try:
        required = metadata.requires("xditd") or []
    except metadata.PackageNotFoundError:
        yield warning(
            "packages", "xditd runs from a source folder", "pip install it for exact version checks."
        )
        return
    light = [line for line in required if "extra ==" not in line]
    yield _packages("packages of the client", light, "pip install xditd")
    daemon = [line for line in required if re.search(r"""extra == ["']daemon["']""", line)]
    yield _packages("packages of the daemon", daemon, "pip install 'xditd[daemon]'")


def _packages(component: str, required: list[str], cure: str) -> Check:
    found, wrong = [], []
    for line in required:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:(==|>=)\s*([\d.]+))?", line)
        if match is None or _not_for_here(line):
            continue
        name, relation, wanted = match.groups()
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {there}")
        if relation and not satisfies(there, relation, wanted):
            wrong.append(f"{name} is {there}, needed is {relation} {wanted}")
    if wrong:
        return failed(component, "; ".join(wrong), f"{cure}.")
    return ok(component, ", ".join(found))


def _not_for_here(line: str) -> bool:
    match = re.search(r"""python_version\s*<\s*["']3\.(\d+)["']""", line)
    return bool(match and sys.version_info >= (3, int(match[1])))


def satisfies(there: str, relation: str, wanted: str) -> bool:
    """Whether a version meets "==" or ">="; what is not written counts as 0."""
    a, b = version(there), version(wanted)
    length = max(len(a), len(b))
    a, b = a + (0,) * (length - len(a)), b + (0,) * (length - len(b))
    return a == b if relation == "==" else a >= b


def kernel() -> Check:
    found = f"{os.uname().sysname} {os.uname().release}"
    if not hasattr(os, "pidfd_open"):
        return failed("kernel", found, "xditd needs Linux 5.4 or newer (pidfd).")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return failed(
            "kernel",
            f"{found}: no pidfd, {error.strerror}",
            "Use Linux 5.4 or newer; in a container allow pidfd_open.",
        )
    return ok("kernel", f"{found}, pidfd works")


def shared_memory(nbytes: int = 64 << 20) -> Check:
    """A segment as the daemon makes them: memfd, reserved, sealed, mapped."""
    try:
        descriptor = os.memfd_create("xditd-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            fcntl.fcntl(
                descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            with mmap.mmap(descriptor, nbytes) as mapped:
                mapped[-1] = 1
        finally:
            os.close(descriptor)
    except (OSError, AttributeError) as error:
        return failed(
            "shared memory",
            f"a sealed memfd segment of {words.size(nbytes)} cannot be made: {error}",
            "Use Linux 4.14 or newer, and give the container or cgroup more memory.",
        )
    return ok("shared memory", f"sealed memfd segments work ({words.size(nbytes)} tried)")


def descriptors(least: int = 4096) -> Check:
    """The daemon raises its soft limit to the hard one by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} now, at most {_limit(hard)}"
    if hard != resource.RLIM_INFINITY and hard < least:
        return failed(
            "file descriptors",
            found,
            f"Raise the hard limit to {least} or more: LimitNOFILE= or /etc/security/limits.conf.",
        )
    return ok("file descriptors", found)


def locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < 8 << 20:
        return warning(
            "locked memory",
            f"at most {words.size(soft)}",
            "NCCL over InfiniBand needs more: LimitMEMLOCK=infinity, as systemd/xditd.service has it.",
        )
    return ok(
        "locked memory", "no limit" if soft == resource.RLIM_INFINITY else f"at most {words.size(soft)}"
    )


def memory(least: int = 4 * GIB) -> Check:
    there = psutil.virtual_memory()
    found = f"{words.size(there.available)} free of {words.size(there.total)}"
    if there.available < least:
        return warning("memory", found, "Close something: a rank needs 1 to 2 GiB beside its model.")
    return ok("memory", found)


def disk(least: int = 2 * GIB) -> Check:
    """Where compiled kernels and rendezvous files go."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    found = f"{words.size(free)} free in {folder}"
    if free < least:
        return warning("disk", found, "Free some: compiled kernels and temporary files go there.")
    return ok("disk", found)


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else str(value)
