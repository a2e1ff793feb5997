"""A segment that was received can not be pulled away, and what could be is not accepted."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import resource

import pytest

from tests.handoff.host import segments_of
from xditd.handoff import memory
from xditd.handoff.segments import Segment, create
from xditd.protocol.errors import Code, XditError

SIZE = 256 * 1024


def test_two_mappings_share_their_bytes() -> None:
    fd = create(SIZE)
    one, two = Segment(os.dup(fd), SIZE), Segment(fd, SIZE)
    one.view(64, 5)[:] = b"hello"
    assert bytes(two.view(64, 5)) == b"hello"
    one.close()
    two.close()


def test_the_other_side_can_neither_shrink_nor_grow_it_nor_take_the_seals_off() -> None:
    fd = create(SIZE)
    ours = Segment(os.dup(fd), SIZE)
    for size in (0, SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)
    assert bytes(ours.view(SIZE - 4, 4)) == bytes(4)  # still there to be read


def unsealed() -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, SIZE)
    return fd


def half_sealed() -> int:
    fd = unsealed()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def full_of_holes() -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def read_only() -> int:
    fd = unsealed()
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def plain_file() -> int:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.posix_fallocate(fd, 0, SIZE)
    return fd


def a_pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize("make", [unsealed, half_sealed, full_of_holes, read_only, plain_file, a_pipe])
def test_what_is_no_sealed_and_allocated_memfd_is_refused_and_closed(make) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(XditError) as refusal:
        Segment(make(), SIZE)
    assert refusal.value.code == Code.BAD_SLOT
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("announced", [SIZE - 4096, SIZE + 4096, SIZE + 1])
def test_another_size_than_was_announced_is_refused(announced: int) -> None:
    with pytest.raises(XditError, match="bytes"):
        Segment(create(SIZE), announced)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, -4), (SIZE, 1), (SIZE - 3, 4), (0, SIZE + 1)])
def test_no_view_reaches_outside(offset: int, nbytes: int) -> None:
    segment = Segment(create(SIZE), SIZE)
    with pytest.raises(XditError) as refusal:
        segment.view(offset, nbytes)
    assert refusal.value.code == Code.BAD_SLOT


def test_memory_goes_with_the_last_view_and_not_before() -> None:
    gc.collect()
    before = segments_of()
    segment = Segment(create(SIZE), SIZE)
    view = segment.view(0, 4)
    segment.close()
    view[:] = b"live"
    assert bytes(view) == b"live"
    with pytest.raises(XditError, match="closed"):
        segment.view(0, 4)
    del view
    assert segments_of() == before


def test_a_machine_without_memory_refuses_before_it_fills_what_it_has(monkeypatch) -> None:
    """A memfd has no ENOSPC: filling it until the kernel kills somebody must not be how one finds out."""
    monkeypatch.setattr(memory, "available", lambda: SIZE)
    with pytest.raises(XditError, match=str(SIZE)) as refusal:
        create(SIZE)
    assert refusal.value.code == Code.ARENA_EXHAUSTED


def test_an_allocation_that_fails_is_a_clean_error_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 4096, hard))
    try:
        with pytest.raises(XditError) as refusal:
            create(SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.code == Code.ARENA_EXHAUSTED
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_left_is_what_the_machine_and_every_control_group_leave(tmp_path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    cgroup.write_text("4:memory:/old\n0::/system.slice/xditd.service\n")
    assert memory.available(meminfo, cgroup, tmp_path) == 800 * 1024  # no such groups

    service = tmp_path / "system.slice" / "xditd.service"
    service.mkdir(parents=True)

    def limit(folder, most: str, used: int, droppable: int) -> None:
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\n")

    limit(service, "max\n", 7, 0)
    limit(service.parent, "300000\n", 200000, 50000)
    assert memory.available(meminfo, cgroup, tmp_path) == 150000
    limit(service, "100\n", 200, 50)
    assert memory.available(meminfo, cgroup, tmp_path) == 0


def test_its_pages_are_there_before_anybody_touches_them() -> None:
    fd = create(SIZE)
    assert os.fstat(fd).st_blocks * 512 >= SIZE
    os.close(fd)
    assert SIZE % mmap.PAGESIZE == 0
