"""`serve`: one process that loads a model, answers requests, drains at the first signal and exits at the second."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager

import grpc

from hsrpc.errors import EngineFaultError
from hsrpc.server.config import ServerConfig
from hsrpc.server.contract import Engine
from hsrpc.server.listener import Server
from hsrpc.server.state import Phase


async def serve(
    engine: AbstractAsyncContextManager[Engine],
    config: ServerConfig,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> None:
    """Serve `engine`, not entered yet, until a signal ends it. Prints `listening on HOST:PORT` once bound.

    Must run in the main thread, which alone can handle signals.

    Raises:
        ConfigError: the address cannot be bound; or what entering the engine raises.
        EngineFaultError: the engine died; its streams have ended with UNAVAILABLE.
        SystemExit: a second signal came, or one while loading; 128 plus its number.
    """
    server = Server(config, interceptors)
    await server.start()
    print(f"listening on {server.address}", flush=True)
    stopping = asyncio.Event()
    running = asyncio.create_task(_run(server, engine, stopping))
    shutdown = _Shutdown(server, running, stopping)
    try:
        with _signal_handler(shutdown.on_signal):
            await asyncio.wait({running})
        if shutdown.exit_code is not None:
            raise SystemExit(shutdown.exit_code)
        if running.cancelled() or running.exception():
            await server.fail()
        await running
    finally:
        running.cancel()
        await server.stop()
        await asyncio.wait({running})


async def _run(server: Server, engine: AbstractAsyncContextManager[Engine], stopping: asyncio.Event) -> None:
    async with engine as loaded:
        await server.attach(loaded)
        await _run_until_drained(server, loaded, stopping)


async def _run_until_drained(server: Server, engine: Engine, stopping: asyncio.Event) -> None:
    """Return once drained; an engine that dies before ends it at once, in any phase."""
    fault = asyncio.ensure_future(engine.wait_failed())
    drained = asyncio.ensure_future(_drain(server, stopping))
    try:
        await asyncio.wait({fault, drained}, return_when=asyncio.FIRST_COMPLETED)
        if fault.done():
            await server.fail()
            raise fault.exception() or EngineFaultError("an engine task has ended")
        await drained
    finally:
        fault.cancel()
        drained.cancel()


async def _drain(server: Server, stopping: asyncio.Event) -> None:
    await stopping.wait()
    await server.drain()


class _Shutdown:
    """The first signal while serving drains; any other ends the process now."""

    def __init__(self, server: Server, running: asyncio.Task[None], stopping: asyncio.Event) -> None:
        self.exit_code: int | None = None
        self._server = server
        self._running = running
        self._stopping = stopping

    def on_signal(self, number: int) -> None:
        if self._server.state.phase is Phase.SERVING and not self._stopping.is_set():
            self._stopping.set()
        else:
            self.exit_code = 128 + number
            self._running.cancel()


@contextmanager
def _signal_handler(handle: Callable[[int], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
