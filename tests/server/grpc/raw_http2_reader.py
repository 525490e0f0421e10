"""An HTTP/2 client over a bare socket that reads what it wants of its streams: libraries read all."""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

from google.protobuf.message import Message

PATIENCE = 20.0
"""Seconds."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4


class RawReader:
    """A connection whose streams may be sent `window` bytes each before they are read on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader, self._writer = reader, writer
        self._next_id = 1
        self.bodies: defaultdict[int, bytes] = defaultdict(bytes)
        """DATA of each stream."""
        self.answered: set[int] = set()
        """Streams with headers."""
        self.ended: set[int] = set()
        """Streams that the server has ended or reset."""
        self.reset: set[int] = set()
        self.is_cut = False
        self._news = asyncio.Event()
        writer.write(_PREFACE + _frame(_SETTINGS, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)))

    def call(self, path: str, request: Message) -> int:
        """Begin a call; the id of its stream."""
        stream, self._next_id = self._next_id, self._next_id + 2
        body = request.SerializeToString()
        message = b"\0" + len(body).to_bytes(4, "big") + body
        headers = _headers({":method": "POST", ":scheme": "http", ":path": path, ":authority": "test"})
        headers += _headers({"te": "trailers", "content-type": "application/grpc"})
        self._writer.write(
            _frame(_HEADERS, headers, _END_HEADERS, stream) + _frame(_DATA, message, _END_STREAM, stream)
        )
        return stream

    def read_on(self, stream: int, num_bytes: int = 2**20) -> None:
        """Let a stream be sent more."""
        window = num_bytes.to_bytes(4, "big")
        self._writer.write(_frame(_WINDOW_UPDATE, window, 0, stream) + _frame(_WINDOW_UPDATE, window))

    async def until_reset(self, streams: Iterable[int]) -> None:
        """Wait until the server has reset all of these."""
        await self._until(lambda: self.reset.issuperset(streams))

    async def until_ended(self, stream: int) -> None:
        await self._until(lambda: stream in self.ended)

    async def until_answered(self, stream: int) -> None:
        await self._until(lambda: stream in self.answered)

    async def until_cut(self) -> None:
        """Wait until the server has closed the connection."""
        await self._until(lambda: self.is_cut)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def listen(self) -> None:
        """Take frames until the connection ends."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                self._news.set()
        self.is_cut = True
        self._news.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._writer.write(_frame(kind, payload if kind == _PING else b"", _ACK))
        elif kind == _DATA:
            self.bodies[stream] += payload
        elif kind == _HEADERS:
            self.answered.add(stream)
            if flags & _END_STREAM:
                self.ended.add(stream)
        elif kind == _RST_STREAM:
            self.reset.add(stream)


@asynccontextmanager
async def raw_reader(port: int, window: int = 0) -> AsyncIterator[RawReader]:
    """A connection to a port of the loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = RawReader(reader, writer, window)
    listening = asyncio.create_task(raw.listen())
    try:
        yield raw
    finally:
        listening.cancel()
        writer.close()


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _headers(fields: dict[str, str]) -> bytes:
    """Never indexed literals without Huffman coding; each shorter than 127 bytes."""
    coded = b""
    for name, value in fields.items():
        assert len(value) < 127
        coded += b"\x10" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return coded
