"""A client whose messages never end, by the rules of flow control: what a server lets it send is what it must hold."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter

from hsrpc.testing.raw_http2 import ACK, DATA, SETTINGS, WINDOW_UPDATE, RawConnection, frame, message

_INITIAL_WINDOW_SIZE = 4
_DEFAULT_WINDOW = 65_535
_MAX_FRAME = 16_384


class HalfMessages:
    """Calls of a connection, each with a message of `size` bytes of which `sent` may be sent."""

    def __init__(self, connection: RawConnection, size: int, sent: int) -> None:
        self._connection = connection
        self._data = message(bytes(size))[:sent]
        self._sent: Counter[int] = Counter()
        """Bytes by stream."""

    @property
    def taken(self) -> int:
        """Bytes that the server has let this client send."""
        return self._sent.total()

    def begin(self, method: str, calls: int) -> None:
        for _ in range(calls):
            self._sent[self._connection.call(method)] = 0

    async def push(self, quiet: float = 0.5) -> int:
        """Send all that the server takes, until it has taken no more for `quiet` seconds; how much that is."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while loop.time() < last + quiet:
            if self._push():
                last = loop.time()
            await asyncio.sleep(0.02)
        return self.taken

    def _push(self) -> int:
        before, windows = self.taken, self._windows()
        for stream, sent in self._sent.items():
            room = min(windows[stream], windows[0], len(self._data) - sent)
            while room > 0:
                part = self._data[self._sent[stream] :][: min(room, _MAX_FRAME)]
                self._connection.write(frame(DATA, part, stream))
                self._sent[stream] += len(part)
                windows[0] -= len(part)
                room -= len(part)
        return self.taken - before

    def _windows(self) -> Counter[int]:
        """Bytes that may be sent now on each stream, and on all, which is 0."""
        initial, windows = _DEFAULT_WINDOW, Counter({0: _DEFAULT_WINDOW - self.taken})
        for each in self._connection.frames:
            if each.kind == WINDOW_UPDATE:
                windows[each.stream] += struct.unpack(">I", each.payload)[0]
            elif each.kind == SETTINGS and not each.flags & ACK:
                initial = dict(struct.iter_unpack(">HI", each.payload)).get(_INITIAL_WINDOW_SIZE, initial)
        for stream, sent in self._sent.items():
            windows[stream] += initial - sent
        return windows
