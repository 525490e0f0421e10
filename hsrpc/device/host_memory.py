"""Host memory of this process: what is free, what the limits of its control groups leave, what the machine may add."""

from __future__ import annotations

import mmap
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_RESERVED_SHARE = 1 / 16
"""Part of a machine's memory that its kernel may keep for itself, so that it never becomes free."""
_NO_LIMIT = sys.maxsize // mmap.PAGESIZE * mmap.PAGESIZE
"""What version 1 has in place of a limit."""
_CAP_IPC_LOCK = 14
"""Number of the capability with which RLIMIT_MEMLOCK does not count."""


class _Files(NamedTuple):
    """Where a version of control groups has its limits and use of memory."""

    mount: str
    controller: str
    """In a line of /proc/self/cgroup."""
    limits: tuple[str, ...]
    used: str


_VERSIONS = (
    _Files("sys/fs/cgroup", "", ("memory.max", "memory.high"), "memory.current"),
    _Files("sys/fs/cgroup/memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"),
)
"""Version 2, where a process is throttled from the second limit on: for ever, as pinned memory cannot be reclaimed."""


class GroupLimit(NamedTuple):
    """A limit of memory, of the process's control group or of one that it is in."""

    left: int
    """Bytes that can be taken; the file cache counts as free."""
    size: int
    """Bytes."""
    file: Path


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory that this process can take."""

    free: int
    """Bytes now: Linux' MemAvailable, or what the limit leaves."""
    obtainable: int
    """Bytes if the machine brings in all that it has, as virtual ones do while memory is used; no less than `free`."""
    limit: GroupLimit | None
    """The tightest of the control groups'; None: there is none."""

    @classmethod
    def read(cls, root: Path = Path("/")) -> HostMemory:
        """As it is now; `root` has /proc and /sys."""
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        present = _present(root)
        more = max(0, int(present * (1 - _RESERVED_SHARE)) - total)
        limit = min(_group_limits(root), default=None)
        left = sys.maxsize if limit is None else max(0, limit.left)
        return cls(min(available, left), min(available + more, left), limit)


def _present(root: Path) -> int:
    """Bytes of the machine's memory, whether the kernel uses them yet or not; 0: it does not say."""
    try:
        zones = (root / "proc/zoneinfo").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(r"^ +present +(\d+)$", zones, re.MULTILINE))) * mmap.PAGESIZE


def _group_limits(root: Path) -> Iterator[GroupLimit]:
    for files in _VERSIONS:
        for group in _groups(root, files):
            yield from _limits(group, files)


def _groups(root: Path, files: _Files) -> Iterator[Path]:
    """The process's control group, and those around it, as far as they can be seen: a container sees its own as all."""
    mount = root / files.mount
    path = PurePosixPath(_group_path(root, files.controller)).relative_to("/")
    if ".." not in path.parts:
        yield from (mount / part for part in (path, *path.parents) if part != PurePosixPath("."))
    yield mount


def _group_path(root: Path, controller: str) -> str:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    groups = (line.split(":", 2) for line in lines)
    return next((path for _, controllers, path in groups if controller in controllers.split(",")), "/")


def _limits(group: Path, files: _Files) -> Iterator[GroupLimit]:
    for name in files.limits:
        try:
            size = int((group / name).read_text())
            left = size - int((group / files.used).read_text()) + _cached(group)
        except (OSError, ValueError):  # no such control group, or `max`: no limit
            continue
        if size < _NO_LIMIT:
            yield GroupLimit(left, size, group / name)


def _cached(group: Path) -> int:
    """Bytes of the file cache of a control group and those in it; in version 1 those are the sums with `total_`."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    names = ("inactive_file", "active_file")
    return sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in names)


def lock_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may lock; None: no limit holds for it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    [capabilities] = re.findall(r"^CapEff:\s*(\w+)$", (root / "proc/self/status").read_text(), re.MULTILINE) or ["0"]
    if limit == resource.RLIM_INFINITY or int(capabilities, 16) >> _CAP_IPC_LOCK & 1:
        return None
    return limit
