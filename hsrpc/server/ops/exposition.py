"""Answers Prometheus' scrapes: GET /metrics, one request a connection, bounded in time, size and number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from hsrpc.errors import ConfigError
from hsrpc.server.config import join_address

_SECONDS = 5.0
"""Most time for one request and its answer."""
_MAX_CONNECTIONS = 16
_MAX_HEAD_BYTES = 16 * 1024


@asynccontextmanager
async def exposed(registry: CollectorRegistry, host: str, port: int) -> AsyncIterator[int]:
    """Listens while entered; yields the port.

    Raises:
        ConfigError: it cannot be bound.
    """
    endpoint = _Endpoint(registry)
    try:
        server = await asyncio.start_server(endpoint.serve, host, port, limit=_MAX_HEAD_BYTES)
    except OSError:
        problem = f"cannot be bound on {join_address(host, port)}"
        raise ConfigError("metrics_port", port, problem, "take a free port, or 0") from None
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class _Endpoint:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._has_asked: dict[asyncio.StreamWriter, bool] = {}
        """Whether each connection has sent its request; oldest first."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; where there are too many, the oldest one ends, first of all one that says nothing."""
        if len(self._has_asked) == _MAX_CONNECTIONS:
            self._end_one()
        self._has_asked[writer] = False
        writer.transport.set_write_buffer_limits(0)  # what is drained is sent, and nothing is left to send at close
        try:
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                self._has_asked[writer] = True
                await self._answer(head.decode("latin-1").split("\r\n"), writer)
            writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._has_asked.pop(writer, None)

    def _end_one(self) -> None:
        writer = min(self._has_asked, key=self._has_asked.__getitem__)
        del self._has_asked[writer]
        writer.transport.abort()  # its task sees the end of the connection

    async def _answer(self, head: list[str], writer: asyncio.StreamWriter) -> None:
        method, path = (*head[0].split(" "), "", "")[:2]
        if path.partition("?")[0] != "/metrics":
            return await _send(writer, "404 Not Found", "text/plain", b"see /metrics\n")
        if method != "GET":
            return await _send(writer, "405 Method Not Allowed", "text/plain", b"use GET\n")
        accept = next((line.partition(":")[2] for line in head if line.lower().startswith("accept:")), "")
        encode, content_type = choose_encoder(accept)
        # On another thread: hundreds of series take milliseconds.
        return await _send(writer, "200 OK", content_type, await asyncio.to_thread(encode, self._registry))


async def _send(writer: asyncio.StreamWriter, status: str, content_type: str, body: bytes) -> None:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
