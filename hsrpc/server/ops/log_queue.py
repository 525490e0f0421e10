"""A log that makes nobody wait: lines go through a bounded queue to a thread that writes them."""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

MAX_WAITING_BYTES = 8 * 1024**2
"""Lines that wait to be written; some 25,000 of requests."""
FLUSH_SECONDS = 1.0
"""Most time that the end of the process waits for lines to be written."""
_STDERR = 2


def write_to_stderr(data: bytes) -> None:
    """Write all of `data`; waits for a reader.

    Past `sys.stderr`, whose lock the interpreter takes as it ends: a thread that waits with it would abort the process.

    Raises:
        OSError: standard error is closed.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(_STDERR, left) :]
        except BlockingIOError:  # somebody who shares it has made it non-blocking
            select.select([], [_STDERR], [])


class LogQueue(logging.Handler):
    """A handler that never waits for what its lines are written to.

    A line that finds `MAX_WAITING_BYTES` waiting is dropped, as is one whose writing fails. `count_dropped` is told at
    once; the log has the number as a line once all that waits can be written.
    """

    def __init__(self, write: Callable[[bytes], object], count_dropped: Callable[[], None]) -> None:
        super().__init__()
        self._write = write
        self._count_dropped = count_dropped
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        """Lines that the log has not told of."""
        self._changed = Condition()
        Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._encode(record)
        except Exception:  # a record whose arguments do not fit its message ends nothing
            self._drop()
            return
        with self._changed:
            fits = self._bytes + len(line) <= MAX_WAITING_BYTES
            if fits:
                self._lines.append(line)
                self._bytes += len(line)
                self._changed.notify_all()
        if not fits:
            self._drop()

    def flush(self) -> None:
        """Wait until all lines are written, at most `FLUSH_SECONDS`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, FLUSH_SECONDS)

    def _encode(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _drop(self) -> None:
        with self._changed:
            self._dropped += 1
        self._count_dropped()

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines[0]  # stays there while it is written: `flush` waits for it
                told = self._dropped if len(self._lines) == 1 else 0
            try:
                self._write(line + self._notice(told))
            except OSError:
                self._drop()
                told = 0
            with self._changed:
                self._lines.popleft()
                self._bytes -= len(line)
                self._dropped -= told
                self._changed.notify_all()

    def _notice(self, dropped: int) -> bytes:
        if not dropped:
            return b""
        text = "%d lines of the log were dropped: they could not be written in time"
        return self._encode(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (dropped,), None))
