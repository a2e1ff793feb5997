"""How much memory this process may still take before the kernel starts to kill. It allocates nothing.

A memfd lies on a tmpfs without a limit: a segment that the machine has no room for is not refused with ENOSPC, it is
filled until the out-of-memory killer ends some process, perhaps one that has nothing to do with it. So we look first.
"""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, cgroups: Path = _CGROUPS) -> int:
    """Bytes: what the kernel thinks can be had without swapping, and what every control group (v2) above us leaves.

    Args:
        meminfo, cgroup, cgroups: where the kernel says it.
    """
    left = _machine(meminfo)
    path = next((line[3:] for line in cgroup.read_text().splitlines() if line.startswith("0::")), "/")
    group = cgroups / path.strip("/")
    for folder in (group, *group.parents):
        if folder == cgroups or cgroups not in folder.parents:
            break  # the root group has no limit
        left = min(left, _group(folder, left))
    return left


def _machine(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not say MemAvailable")


def _group(folder: Path, unlimited: int) -> int:
    """Bytes left in one control group: its limit less what it uses, not counting file pages that can be dropped."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return unlimited  # no memory controller here
    if limit == "max":
        return unlimited
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
