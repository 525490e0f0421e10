"""Files that are read again when they change: certificates and tokens are replaced while the server runs."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from hsrpc.errors import ConfigError

CHECK_SECONDS = 1.0
"""Files are looked at no more often than this."""
_MAX_BYTES = 1024**2
_OTHERS = stat.S_IRWXO | stat.S_IWGRP

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Reloaded(Generic[T]):
    """What `load` makes of files. A change that it refuses is logged, and what there was stays. Safe in threads.

    `count_failure` is told of each such change.

    Raises:
        ConfigError: on construction, what `load` raises.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T], count_failure: Callable[[], None]) -> None:
        self._paths = paths
        self._load = load
        self._count_failure = count_failure
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._seen: list[tuple[int, ...] | None] | None = self._signature()
        self._value = load()

    def current(self) -> T:
        """The value, at most `CHECK_SECONDS` older than the files."""
        with self._lock:
            if time.monotonic() - self._looked >= CHECK_SECONDS:
                self._look()
            return self._value

    def reload(self) -> None:
        """Read the files again now, whether or not they seem to have changed."""
        with self._lock:
            self._seen = None
            self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        # Taken before the files are read: what changes meanwhile is seen the next time.
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._load()
        except ConfigError as error:
            _log.error("%s cannot be used, what was read before stays: %s", names, error)
            self._count_failure()
        else:
            _log.info("%s was read again", names)

    def _signature(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _count_nothing() -> None:
    """Nobody asks how many changes could not be used."""


class ReloadedFiles:
    """All files of one server that are read again; `count_failure` is told of each change that cannot be used."""

    def __init__(self, count_failure: Callable[[], None] | None = None) -> None:
        self._count_failure = count_failure or _count_nothing
        self._watched: list[Reloaded[Any]] = []

    def watch(self, paths: Sequence[Path], load: Callable[[], T]) -> Reloaded[T]:
        """What `load` makes of files.

        Raises:
            ConfigError: what `load` raises.
        """
        reloaded = Reloaded(paths, load, self._count_failure)
        self._watched.append(reloaded)
        return reloaded

    def reload(self) -> None:
        """Read all again now."""
        for reloaded in self._watched:
            reloaded.reload()


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def read_file(path: Path, field: str, *, secret: bool) -> bytes:
    """All of a small file; one that is `secret` must be closed to others.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or its mode lets others read or change it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise ConfigError(field, str(path), problem, "give a file that the server may read") from None
    if secret and mode & _OTHERS:
        problem = f"mode {stat.S_IMODE(mode):03o} lets others read or change it"
        raise ConfigError(field, str(path), problem, f"run `chmod 600 {path}`, or 440 for a group")
    if len(data) > _MAX_BYTES:
        raise ConfigError(field, str(path), "larger than 1 MiB", "give the right file")
    return data
