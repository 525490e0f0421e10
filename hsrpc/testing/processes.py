"""What a test wants to know of processes: its own, and those that it has started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class _Status(NamedTuple):
    state: str
    """A letter, as proc(5) has it: Z has ended, and was not waited for."""
    parent: int


def is_there(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    status = _status(pid)
    return status is not None and status.state != "Z"


def children(pid: int) -> list[int]:
    """Processes that a process has started, and that are there or were not waited for."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [number for number in numbers if (status := _status(number)) is not None and status.parent == pid]


def shared_memory() -> set[str]:
    """Names of what lies in memory that processes share."""
    return {each.name for each in (Path("/dev") / "shm").iterdir()}


def _status(pid: int) -> _Status | None:
    """None: there is no such process."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Status(state, int(parent))
