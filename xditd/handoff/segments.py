"""Segments: sealed memory that two processes share. It knows no sockets and no slots.

A segment is a memfd that can neither shrink nor grow and whose pages all exist, so that no other process, careless
or hostile, can kill a reader with SIGBUS. It has no name: when its last descriptor and mapping go, it is gone.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from xditd.handoff import memory
from xditd.protocol.errors import Code, XditError

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""What every segment carries."""

_FROZEN = fcntl.F_SEAL_WRITE | 0x0010  # F_SEAL_FUTURE_WRITE, which fcntl names from 3.14 on


def create(nbytes: int) -> int:
    """Makes a segment and returns its descriptor. Its pages are allocated here, which takes time: 0.2 to 2 s per GiB.

    Raises:
        XditError: `arena_exhausted` where the machine has no memory or the process no descriptor left for it.
    """
    left = memory.available() * 7 // 8
    if nbytes > left:
        raise XditError(
            Code.ARENA_EXHAUSTED,
            f"The machine has no memory for a shared segment of {nbytes} bytes: {left} can be had. Close what else "
            "runs on it, or ask for less.",
        )
    fd = -1
    try:
        fd = os.memfd_create("xditd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Unlike ftruncate, what fails does so here and not at the first touch.
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        scarce = "file descriptors" if error.errno in (errno.EMFILE, errno.ENFILE) else "memory"
        raise XditError(
            Code.ARENA_EXHAUSTED,
            f"The daemon could not get a shared segment of {nbytes} bytes: {os.strerror(error.errno or 0)}. "
            f"The machine or the daemon's unit is short of {scarce}.",
        ) from error
    return fd


class Segment:
    """One segment, mapped.

    Args:
        fd: its descriptor; taken over and closed, whatever the outcome.
        nbytes: the size that it must have.

    Raises:
        XditError: `bad_slot` where the descriptor is not a sealed memfd of that size with all its pages,
            `arena_exhausted` where it can not be mapped.
    """

    __slots__ = ("_map", "_memory", "nbytes")

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            _inspect(fd, nbytes)
            # Populated: a first touch of each page later would cost about as much as the copy itself.
            self._map: mmap.mmap | None = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise XditError(
                Code.ARENA_EXHAUSTED,
                f"A shared segment of {nbytes} bytes could not be mapped: {os.strerror(error.errno or 0)}. "
                "Raise this process's memory limit (RLIMIT_AS) or its limit of open files.",
            ) from error
        finally:
            os.close(fd)
        self._memory: memoryview | None = memoryview(self._map)
        self.nbytes = nbytes

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes [offset, offset + nbytes), writable, not copied.

        Raises:
            XditError: `bad_slot` where they are not all in the segment, or the segment is closed.
        """
        memory = self._memory
        if memory is None:
            raise XditError(Code.BAD_SLOT, "The segment is closed: its client or its daemon is gone.")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise XditError(
                Code.BAD_SLOT,
                f"{nbytes} bytes at {offset} are not all inside a segment of {self.nbytes} bytes.",
            )
        return memory[offset : offset + nbytes]

    def close(self) -> None:
        """Gives no further views. The memory is unmapped when the last view is gone, at once if there is none."""
        self._memory = None
        self._map = None


def _inspect(fd: int, nbytes: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise XditError(Code.BAD_SLOT, "A received segment is not a memfd that can be sealed.") from error
    if seals & SEALS != SEALS:
        raise XditError(Code.BAD_SLOT, "A received segment is not sealed against shrinking and growing.")
    if seals & _FROZEN:
        raise XditError(Code.BAD_SLOT, "A received segment is sealed against writing.")
    found = os.fstat(fd)
    if found.st_size != nbytes:
        raise XditError(
            Code.BAD_SLOT, f"A received segment has {found.st_size} bytes, but {nbytes} were announced."
        )
    if found.st_blocks * 512 < nbytes:
        raise XditError(Code.BAD_SLOT, "A received segment has pages that are not allocated.")
