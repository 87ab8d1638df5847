"""CPUs and memory that this process may use, by its affinity and the limits of its cgroups. Knows no models.

On Linux a limit of any cgroup holds for all groups below it, so each figure is the least over the process's own group and all
ancestors that the mounted hierarchies show. What cannot be read limits nothing; other systems have the machine's own figures.
`root` is where the file system begins: a test builds its own.
Source: Linux admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/memory.rst, scheduler/sched-bwc.rst; proc(5), cgroup_namespaces(7)
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 spells "no limit" as the largest number of whole pages

# Limits, usage, and the rows of memory.stat with pages of files, which the system takes back before it refuses memory. Not
# `file` or `cache`: these count shared memory too, which stays. The rows of version 1 without total_ lack the groups below.
_MEMORY_FILES = (
    (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


class _Mount(NamedTuple):
    """A mounted hierarchy of cgroups."""

    kind: str  # of file system
    options: list[str]
    top: str  # the group at its top
    point: PurePosixPath  # where that is mounted


def usable_cpus(root: Path = _ROOT) -> int:
    """Logical CPUs that this process may keep busy."""
    n_allowed = len(_affinity() or ()) or psutil.cpu_count() or 1
    return min(n_allowed, cpu_quota(root) or n_allowed)


def machine_cores() -> int:
    """Physical cores of this machine; logical ones where the system does not say."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def usable_cores(root: Path = _ROOT) -> int:
    """Physical cores that this process may run on, by its affinity; the quota of its groups is `cpu_quota`."""
    cpus, folder = _affinity(), root / "sys/devices/system/cpu"
    if not cpus:
        return machine_cores()
    siblings = {_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return min(len(siblings), machine_cores())


def cpu_quota(root: Path = _ROOT) -> int | None:
    """Whole CPUs whose time the cgroups allow, at least 1; None where they do not limit it."""
    found = []
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max") or f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
        with contextlib.suppress(ValueError):  # "max 100000", or no such file
            quota, period = map(int, words.split())
            if quota > 0 and period > 0:  # version 1 has a quota of -1 where there is none
                found.append(max(1, quota // period))
    return min(found, default=None)


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process can still take: what the machine has free, within the limits of its cgroups."""
    free: int = psutil.virtual_memory().available
    return min([free, *(left for _, left in _memory_limits(root))])


def total_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process could have at most: the machine's, within the limits of its cgroups."""
    installed: int = psutil.virtual_memory().total
    return min([installed, *(limit for limit, _ in _memory_limits(root))])


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each group with a limit: the limit, and what is left of it."""
    for group in _groups(root, "memory"):
        for names, usage_name, file_rows in _MEMORY_FILES:
            limits = [_number(group / name) for name in names]
            limit = min((value for value in limits if value is not None and value < _UNLIMITED), default=None)
            usage = _number(group / usage_name)
            if limit is not None and usage is not None:
                rows = dict(re.findall(r"^(\w+) (\d+)$", _text(group / "memory.stat"), re.MULTILINE))
                of_files = sum(int(rows.get(row, 0)) for row in file_rows)
                yield limit, min(limit, max(0, limit - usage + of_files))


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and its ancestors, in each mounted hierarchy that may limit what a controller counts."""
    own = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        own.update(dict.fromkeys(names.split(","), path))  # version 2 has no names
    shown, tops = [], []
    for mount in _mounts(root):
        name = "" if mount.kind == "cgroup2" else controller
        group = own.get(name)
        if group is None or (name and name not in mount.options):
            continue
        top = root / mount.point.relative_to("/")
        tops.append(top)
        with contextlib.suppress(ValueError):  # a mount of another part of the tree
            below = PurePosixPath(group).relative_to(mount.top)
            if ".." not in below.parts:
                shown += [top / part for part in (below, *below.parents)]
    # Under another cgroup namespace a path may leave the mount ("/../job"): its top is then the nearest group that is shown.
    return shown or tops


def _mounts(root: Path) -> Iterator[_Mount]:
    """id parent major:minor TOP POINT options [tags] - TYPE source OPTIONS; spaces within a field are octal escapes."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        words = [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word) for word in line.split(" ")]
        with contextlib.suppress(ValueError, IndexError):
            dash = words.index("-", 6)
            if words[dash + 1] in ("cgroup", "cgroup2"):
                yield _Mount(words[dash + 1], words[dash + 3].split(","), words[3], PurePosixPath(words[4]))


def _affinity() -> set[int] | None:
    """The CPUs that this thread, and those that it starts, may run on; None where the system has no such thing."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    with contextlib.suppress(AttributeError, psutil.Error, OSError):  # macOS has none
        return set(psutil.Process().cpu_affinity())
    return None


def _text(path: Path) -> str:
    """A file's text without the spaces around it; "" where it cannot be read."""
    try:
        return path.read_text("utf-8", "surrogateescape").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def n_killed_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """Processes that the kernel has killed for lack of memory since it started, containers' too; 0 where it does not count.

    Source: Linux, mm/oom_kill.c (OOM_KILL), from 4.13 on
    """
    with contextlib.suppress(OSError, ValueError):
        for line in counters.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
