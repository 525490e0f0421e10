"""HTTP/2 written by hand, for tests of servers: what no client of gRPC would send, or would leave unread."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from google.protobuf.message import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
"""Settings."""
CANCEL = 8
ENHANCE_YOUR_CALM = 11
PATIENCE = 20.0
"""Seconds that a server has for what is waited for."""


class Frame(NamedTuple):
    """One frame, whole."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        """Whether nothing comes after it in its stream."""
        return self.kind == RST_STREAM or (self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM))


def frame(kind: int, payload: bytes = b"", stream: int = 0, flags: int = 0) -> bytes:
    """A frame's bytes."""
    return struct.pack(">IBBI", len(payload), kind, flags, stream)[1:] + payload


def message(data: bytes) -> bytes:
    """As DATA frames carry it: uncompressed, its length, itself."""
    return struct.pack(">BI", 0, len(data)) + data


def headers(method: str, stream: int, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """HEADERS of a call; its fields are literals that are not indexed.

    Raises:
        ValueError: a name or a value has more than 126 characters.
    """
    fields = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "test")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    return frame(HEADERS, block, stream, END_HEADERS)


def _text(value: str) -> bytes:
    if len(value) > 126:
        raise ValueError(
            f"{value[:20]!r}...: {len(value)} characters do not fit a length of one byte; give at most 126"
        )
    return bytes([len(value)]) + value.encode()


def reset(stream: int) -> bytes:
    """RST_STREAM of a client that no longer wants the answer."""
    return frame(RST_STREAM, struct.pack(">I", CANCEL), stream)


class RawConnection:
    """A connection that has sent its preface; answers SETTINGS and PING as it must, and reads on no stream by itself.

    Waiting for something raises TimeoutError after `PATIENCE`, or as long as is said.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int | None = None) -> None:
        """`window`: bytes that each stream may be sent before it is read on; None: as the standard has it, 65535."""
        self.frames: list[Frame] = []
        """What has come."""
        self.is_cut = False
        """The connection has ended, by the server."""
        self._reader, self._writer = reader, writer
        self._came = asyncio.Condition()
        self._next = 1
        self.port: int = writer.get_extra_info("sockname")[1]
        setting = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        writer.write(PREFACE + frame(SETTINGS, setting))

    def next_stream(self) -> int:
        """A number for a stream."""
        self._next += 2
        return self._next - 2

    def call(self, method: str, data: bytes = b"", *metadata: tuple[str, str]) -> int:
        """Begin a call: HEADERS, and DATA if there is any, without the end of the stream. Its stream."""
        stream = self.next_stream()
        self.write(headers(method, stream, metadata) + (frame(DATA, data, stream) if data else b""))
        return stream

    def ask(self, method: str, request: Message) -> int:
        """A call with its whole request. Its stream."""
        stream = self.next_stream()
        data = message(request.SerializeToString())
        self.write(headers(method, stream) + frame(DATA, data, stream, END_STREAM))
        return stream

    def write(self, data: bytes) -> None:
        """Send bytes, soon."""
        self._writer.write(data)

    def read_on(self, stream: int, num_bytes: int = 2**20) -> None:
        """Let a stream be sent more."""
        window = struct.pack(">I", num_bytes)
        self.write(frame(WINDOW_UPDATE, window, stream) + frame(WINDOW_UPDATE, window))

    async def flood(self, method: str, calls: int) -> None:
        """So many calls, each of which is reset at once; fewer, if the server ends the connection."""
        data = message(b"")
        with suppress(OSError):
            for _ in range(calls):
                self.write(reset(self.call(method, data)))
                await self._writer.drain()
                if self.is_cut:
                    return

    @property
    def answered(self) -> set[int]:
        """Streams with HEADERS."""
        return {each.stream for each in self.frames if each.kind == HEADERS}

    @property
    def reset(self) -> set[int]:
        """Streams that the server has reset."""
        return {each.stream for each in self.frames if each.kind == RST_STREAM}

    @property
    def ended(self) -> set[int]:
        """Streams that the server has ended, be it by a reset."""
        return {each.stream for each in self.frames if each.ends_stream}

    def body(self, stream: int) -> bytes:
        """DATA of a stream."""
        return b"".join(each.payload for each in self.frames if (each.kind, each.stream) == (DATA, stream))

    async def end_of(self, stream: int) -> bytes:
        """Payload of the frame that ended the stream, once it has come."""
        await self.until(lambda: stream in self.ended)
        return next(each.payload for each in self.frames if each.stream == stream and each.ends_stream)

    async def until_answered(self, streams: Iterable[int]) -> None:
        """Wait until all of these have HEADERS."""
        awaited = set(streams)
        await self.until(lambda: self.answered >= awaited)

    async def until_reset(self, streams: Iterable[int]) -> None:
        """Wait until the server has reset all of these."""
        awaited = set(streams)
        await self.until(lambda: self.reset >= awaited)

    async def until_cut(self) -> None:
        """Wait until the server has closed the connection."""
        await self.until(lambda: self.is_cut)

    async def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until something holds; it is looked at whenever a frame has come, and when the connection is cut."""
        async with asyncio.timeout(patience), self._came:
            await self._came.wait_for(condition)

    async def listen(self) -> None:
        """Take frames until the connection ends."""
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                await self._take(await self._read_frame())
        async with self._came:
            self.is_cut = True
            self._came.notify_all()

    async def _read_frame(self) -> Frame:
        size, kind, flags, stream = struct.unpack(">IBBI", b"\0" + await self._reader.readexactly(9))
        return Frame(kind, flags, stream, await self._reader.readexactly(size))

    async def _take(self, each: Frame) -> None:
        if each.kind in (SETTINGS, PING) and not each.flags & ACK:
            self.write(frame(each.kind, each.payload if each.kind == PING else b"", flags=ACK))
        async with self._came:
            self.frames.append(each)
            self._came.notify_all()


@asynccontextmanager
async def connected(port: int, window: int | None = None, host: str = "127.0.0.1") -> AsyncIterator[RawConnection]:
    """A connection of its own from `host` to a port of the loopback, once the server's settings have come: before they
    are acknowledged gRPC takes few calls. `window` is as in `RawConnection`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
    connection = RawConnection(reader, writer, window)
    listening = asyncio.create_task(connection.listen())
    try:
        await connection.until(lambda: bool(connection.frames))
        yield connection
    finally:
        listening.cancel()
        writer.close()
