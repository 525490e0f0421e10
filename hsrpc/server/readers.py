"""Which connections read what they asked for, and which are to be cut because they do not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_STALLS = 8
"""Stalls on a connection without a stream read to its end between them. Of many users behind one proxy most read."""
_MAX_IDLE = 4096
"""Connections without streams whose stalls are remembered, at most."""
_REPORT_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reader:
    """A connection that has streams, or had some that stalled."""

    streams: int = 0
    """Under way."""
    stalls: int = 0
    """Since a stream was last read to its end."""
    is_owed: bool = False
    """A stream that stalled could not be reset."""

    @property
    def is_lost(self) -> bool:
        return self.stalls >= MAX_STALLS or (self.is_owed and not self.streams)


class Readers:
    """Counts stalls by connection. Cuts one that stalls again and again, and one that has nothing left but what stalled
    and could not be reset."""

    def __init__(self, cut: Callable[[str, int], object]) -> None:
        """`cut` is told the connection, and after how many stalls."""
        self._cut = cut
        self._readers: dict[str, _Reader] = {}
        self._unreported = 0
        """Stalls that the log has not."""
        self._reported = -math.inf

    @contextmanager
    def stream(self, connection: str) -> Iterator[None]:
        """A stream of the connection, which is read to its end if the block ends without an exception."""
        reader = self._readers.setdefault(connection, _Reader())
        reader.streams += 1
        try:
            yield
            reader.stalls = 0
        finally:
            reader.streams -= 1
            self._judge(connection, reader)

    def stalled(self, connection: str, *, is_reset: bool) -> None:
        """What was sent on the connection was left unread for too long; its stream has been reset, or could not be."""
        reader = self._readers.setdefault(connection, _Reader())
        reader.stalls += 1
        reader.is_owed |= not is_reset
        self._report()
        self._judge(connection, reader)

    def _judge(self, connection: str, reader: _Reader) -> None:
        if reader.is_lost:
            self._cut(connection, reader.stalls)
            reader.stalls, reader.is_owed = 0, False
        if not reader.streams:
            self._rest(connection, reader)

    def _rest(self, connection: str, reader: _Reader) -> None:
        """Forget a connection without streams, unless it has stalls: then it becomes the last to be forgotten."""
        self._readers.pop(connection, None)
        if reader.stalls:
            self._readers[connection] = reader
        if len(self._readers) > _MAX_IDLE:
            oldest = next((name for name, reader in self._readers.items() if not reader.streams), connection)
            self._readers.pop(oldest, None)

    def _report(self) -> None:
        """Log stalls, one line for all those of some seconds: stalled clients must not fill the disk."""
        self._unreported += 1
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            _log.warning("%d streams ended that were left unread", self._unreported)
            self._unreported, self._reported = 0, time.monotonic()
