"""A server in the process that measures it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hsrpc.server import Server, ServerConfig
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.ops.telemetry import Telemetry


@asynccontextmanager
async def serving(engine: Engine, telemetry: Telemetry | None = None) -> AsyncIterator[Server]:
    """A server of `engine` on a free port of the loopback, whose calls `telemetry` observes."""
    observed = (telemetry.observers, telemetry.count_call) if telemetry is not None else ()
    server = Server(ServerConfig(port=0), (), *observed)
    await server.start()
    await server.attach(engine)
    try:
        yield server
    finally:
        await server.stop()
