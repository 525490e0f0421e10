"""HTTP/2 written by hand: what no client of gRPC would send."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
CANCEL = 8
ENHANCE_YOUR_CALM = 11
PATIENCE = 10
"""Seconds."""


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, payload: bytes = b"", stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IBBI", len(payload), kind, flags, stream)[1:] + payload


def message(data: bytes) -> bytes:
    """As DATA frames carry it: uncompressed, its length, itself."""
    return struct.pack(">BI", 0, len(data)) + data


def headers(method: str, stream: int, metadata: Iterable[tuple[str, str]] = (), flags: int = END_HEADERS) -> bytes:
    """HEADERS of a call; its fields are literals that are not indexed."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "test")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
    return frame(HEADERS, b"".join(b"\0" + _text(name) + _text(value) for name, value in fields), stream, flags)


def _text(value: str) -> bytes:
    if len(value) > 126:
        raise ValueError("a length of one byte is all that this can write")
    return bytes([len(value)]) + value.encode()


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, struct.pack(">I", CANCEL), stream)


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    """Raises `asyncio.IncompleteReadError` at the end of the connection."""
    head = await reader.readexactly(9)
    size, kind, flags, stream = struct.unpack(">IBBI", b"\0" + head)
    return Frame(kind, flags, stream, await reader.readexactly(size))


class RawConnection:
    """A connection that has sent its preface; answers SETTINGS and PING as it must."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.frames: list[Frame] = []
        """What has come."""
        self.closed = asyncio.Event()
        """The server has ended the connection."""
        self._reader, self._writer = reader, writer
        self._came = asyncio.Condition()
        self._next = 1
        self.port: int = writer.get_extra_info("sockname")[1]
        writer.write(PREFACE + frame(SETTINGS))

    def next_stream(self) -> int:
        self._next += 2
        return self._next - 2

    def call(self, method: str, data: bytes = b"", *metadata: tuple[str, str]) -> int:
        """Begin a call: HEADERS, and DATA if there is any, without the end of the stream. Its stream."""
        stream = self.next_stream()
        self.write(headers(method, stream, metadata) + (frame(DATA, data, stream) if data else b""))
        return stream

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def flood(self, method: str, calls: int) -> None:
        """So many calls, each of which is reset at once; fewer, if the server ends the connection."""
        data = message(b"")
        with suppress(OSError):
            for _ in range(calls):
                self.write(reset(self.call(method, data)))
                await self._writer.drain()
                if self.closed.is_set():
                    return

    async def end_of(self, stream: int) -> bytes:
        """Payload of the HEADERS or RST_STREAM that ended the stream; fails after ten seconds."""

        def ends(each: Frame) -> bool:
            is_last = each.kind == RST_STREAM or (each.kind == HEADERS and each.flags & END_STREAM)
            return each.stream == stream and bool(is_last)

        async with asyncio.timeout(PATIENCE), self._came:
            await self._came.wait_for(lambda: any(map(ends, self.frames)))
        return next(each.payload for each in self.frames if ends(each))

    async def greeted(self) -> None:
        """The server's settings have come, and are acknowledged: before, it takes few calls."""
        async with asyncio.timeout(PATIENCE), self._came:
            await self._came.wait_for(lambda: self.frames)

    async def read(self) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                await self._take(await read_frame(self._reader))
        self.closed.set()

    async def _take(self, each: Frame) -> None:
        if each.kind in (SETTINGS, PING) and not each.flags & ACK:
            self.write(frame(each.kind, each.payload if each.kind == PING else b"", flags=ACK))
        async with self._came:
            self.frames.append(each)
            self._came.notify_all()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[RawConnection]:
    """A connection of its own to a port of the loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = RawConnection(reader, writer)
    reading = asyncio.create_task(connection.read())
    try:
        await connection.greeted()
        yield connection
    finally:
        reading.cancel()
        writer.close()
