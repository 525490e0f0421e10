"""What every file of results says of itself: which commit was measured, by which command, when, and on what."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from hsrpc.config import DeviceKind, format_bytes
from hsrpc.device.device import open_device

ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"
"""The commit of a copy that has no history, where none was given."""


def header(command: Sequence[str], *, commit: str | None = None) -> dict[str, str]:
    """The header of a file of results: commit, command, UTC day, machine, version of torch.

    `command` are the words of the command line; of an absolute path its last part is kept. `commit` is for a copy of
    the sources without their history.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in command]
    return {
        "commit": commit or _commit(),
        "command": shlex.join(words),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
        "torch": torch.__version__,
    }


def write_json(file: Path, content: object) -> None:
    """Write `content` to the file, which at every moment holds a whole one: the one before, or this."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(fresh, file)


def _commit() -> str:
    """Short hash of the commit that is checked out, and `+` where files differ from it."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{open_device(DeviceKind.AUTO).name}, {os.cpu_count()} CPU cores, {format_bytes(memory)}"
