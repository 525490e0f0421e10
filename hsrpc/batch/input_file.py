"""Input of lines that may be longer than memory: a file, standard input, either of them with gzip or without."""

from __future__ import annotations

import gzip
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from hsrpc.batch.line import Line, read_line, too_long
from hsrpc.batch.refusal import BatchError
from hsrpc.batch.shard import WHOLE, Shard

STANDARD = "-"
_GZIP = b"\x1f\x8b"


def can_read_twice(name: str) -> bool:
    """Whether an input is a file that is there to be read again.

    Raises:
        OSError: there is none.
    """
    return name != STANDARD and stat.S_ISREG(os.stat(name).st_mode)


@contextmanager
def open_lines(name: str, max_bytes: int, shard: Shard = WHOLE) -> Iterator[Iterator[Line]]:
    """The lines of a shard of an input, without empty ones; one of more than `max_bytes` is a fault of its own.

    Raises:
        OSError, BatchError: it cannot be read, or ends within its compressed data.
    """
    if name != STANDARD:
        with Path(name).open("rb") as file:
            yield _lines(name, file, max_bytes, shard)
        return
    if sys.stdin is None:
        raise BatchError("standard input is closed; give a file")
    # Not through `sys.stdin`: whoever ends while a thread waits for it there would wait for that thread.
    with open(0, "rb", closefd=False) as file:
        yield _lines("standard input", file, max_bytes, shard)


def _lines(name: str, raw: BufferedReader, max_bytes: int, shard: Shard) -> Iterator[Line]:
    file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP else raw
    number = 0
    try:
        while data := file.readline(max_bytes + 1):
            number += 1
            is_too_long = len(data) > max_bytes and not data.endswith(b"\n")
            if is_too_long:
                _skip(file, max_bytes)
            if number not in shard:
                continue
            if is_too_long:
                yield too_long(number, max_bytes)
            elif data.strip():
                yield read_line(number, data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BatchError(f"{name}: damaged after line {number} ({error}); copy it again") from None


def _skip(file: BufferedReader | gzip.GzipFile, max_bytes: int) -> None:
    """Read to the end of a line."""
    while (data := file.readline(max_bytes)) and not data.endswith(b"\n"):
        pass
