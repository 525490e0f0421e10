"""Files of output lines, to which nothing is added but whole lines, and of which a kill may have torn the last.

A block of lines is written at once and then synced. In a file with gzip each block is a member of its own, so that a
torn one spoils no other. At resume what is torn is cut off, and its lines run again: none is lost, and none twice.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from hsrpc.batch.line import ID_PREFIX
from hsrpc.batch.refusal import BatchError

_BEGIN = f'{{"id": "{ID_PREFIX}'.encode()
"""Beginning of each line."""
_GZIP = b"\x1f\x8b\x08"
_MAX_TORN = 2**26
"""Bytes that a kill may have left damaged: a larger damage is none of ours, and is not cut."""
_READ = 2**16
"""Bytes, which decompressed take a thousand times as many at worst."""


class Written(NamedTuple):
    """A line of output that an earlier run left."""

    id: str
    custom_id: str | None


class Store(Protocol):
    """Where lines of output go."""

    def resume(self) -> Iterator[Written]:
        """The lines that are there already, once what a kill has torn is cut off; to be read to its end.

        Raises:
            BatchError: it holds something else.
        """
        ...

    def append(self, lines: list[bytes]) -> None:
        """Write, and return once a loss of power would leave it there.

        Raises:
            OSError: it could not be written, or only in part.
        """
        ...

    def close(self) -> None: ...


class StandardOutput:
    """Standard output: nothing of an earlier run is there, and nothing can be synced."""

    def resume(self) -> Iterator[Written]:
        return iter(())

    def append(self, lines: list[bytes]) -> None:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        pass


class OutputFile:
    """A file, which nobody else appends to meanwhile; compressed where its name ends in .gz.

    Raises:
        BatchError: on construction, another process has it.
        OSError: on construction, it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_gzip = path.suffix == ".gz"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise BatchError(f"{path}: another run writes it; wait for its end, or give another file") from None
        _sync_folder(path.parent)

    def resume(self) -> Iterator[Written]:
        self._cut(self._whole_members() if self._is_gzip else self._whole_lines())
        for number, data in enumerate(self._lines(), start=1):
            yield self._read(number, data)

    def append(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        rest = memoryview(gzip.compress(data) if self._is_gzip else data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _lines(self) -> Iterator[bytes]:
        with gzip.open(self._path) if self._is_gzip else self._path.open("rb") as file:
            yield from file

    def _read(self, number: int, data: bytes) -> Written:
        try:
            value = json.loads(data)
            return Written(value["id"], value["custom_id"])
        except (ValueError, RecursionError, KeyError, TypeError):
            raise BatchError(f"{self._path}: line {number} is no output of a batch; give another file") from None

    def _whole_lines(self) -> int:
        """Bytes of the lines before one that has no end, or holds zeros as after a loss of power."""
        end = 0
        with self._path.open("rb") as file:
            for data in file:
                if not data.endswith(b"\n") or b"\0" in data:
                    self._check_torn(data, _BEGIN)
                    break
                end += len(data)
        return end

    def _whole_members(self) -> int:
        """Bytes of the gzip members before one that is torn."""
        end = 0
        with self._path.open("rb") as file:
            while head := file.read(len(_GZIP)):
                file.seek(end)
                size = _member_bytes(file)
                if size is None:
                    self._check_torn(head, _GZIP)
                    file.seek(end)
                    self._check_torn(_member_head(file), _BEGIN)
                    break
                end += size
                file.seek(end)
        return end

    def _check_torn(self, data: bytes, begin: bytes) -> None:
        """Check that what is to be cut off was ours.

        Raises:
            BatchError: it begins otherwise.
        """
        head = data[: len(begin)].rstrip(b"\0")
        if not begin.startswith(head):
            raise BatchError(f"{self._path}: holds something else than output of a batch; give another file")

    def _cut(self, end: int) -> None:
        size = os.fstat(self._file).st_size
        if size - end > _MAX_TORN:
            found = f"damaged at byte {end}, {size - end} bytes before its end, which is more than a kill leaves"
            raise BatchError(f"{self._path}: {found}; restore it, or give another file")
        if end < size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)


def _member_bytes(file: BinaryIO) -> int | None:
    """Bytes of the gzip member that begins where `file` is; None: it is torn."""
    reader, size = zlib.decompressobj(16 + zlib.MAX_WBITS), 0
    try:
        while not reader.eof and (data := file.read(_READ)):
            size += len(data)
            reader.decompress(data)
    except zlib.error:
        return None
    return size - len(reader.unused_data) if reader.eof else None


def _member_head(file: BinaryIO) -> bytes:
    """The first bytes that a torn gzip member holds, as far as they can be read."""
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(file.read(_READ), len(_BEGIN))
    except zlib.error:
        return b""


def _sync_folder(folder: Path) -> None:
    """A new file's name lasts once its folder is synced."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def errors_path(output: Path) -> Path:
    """The file for errors beside `output`: out.errors.jsonl.gz beside out.jsonl.gz."""
    compressed = ".gz" if output.suffix == ".gz" else ""
    plain = output.with_suffix("") if compressed else output
    return plain.with_name(f"{plain.stem}.errors{plain.suffix}{compressed}")
