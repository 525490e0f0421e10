"""The server put together, and `serve`: loads a model, drains at the first signal, ends at the second."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager

import grpc

from hsrpc.errors import EngineFaultError
from hsrpc.server.config import ServerConfig, join_address
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.grpc.listener import GrpcFrontEnd
from hsrpc.server.lifecycle import Lifecycle
from hsrpc.server.observation import CallObserver, CountCall, CountCut
from hsrpc.server.openai.gateway import OpenAiFrontEnd
from hsrpc.server.ops.forced_exit import EXIT_SECONDS, LOADING_EXIT_SECONDS
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.server.reloaded_file import ReloadedFiles
from hsrpc.server.service import Service
from hsrpc.server.state import Phase

ExitWithin = Callable[[float, int], object]

_log = logging.getLogger(__name__)


class Server(Lifecycle):
    """The service with its front ends: gRPC, and, where it has a port, HTTP by a gateway."""

    def __init__(
        self,
        config: ServerConfig,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        observers: Sequence[CallObserver] = (),
        count_call: CountCall | None = None,
        count_failed_reload: Callable[[], None] | None = None,
        *,
        count_cut: CountCut | None = None,
    ) -> None:
        """`observers` are told of the calls of Generate, `count_call` of how each call of any method ended,
        `count_failed_reload` of changes of certificates and tokens that cannot be used, and `count_cut` of connections
        that the server cuts.

        Raises:
            ConfigError: a file of the security settings cannot be used.
        """
        service = Service(config)
        self._files = ReloadedFiles(count_failed_reload)
        self.grpc = GrpcFrontEnd(
            service,
            interceptors,
            observers,
            count_call,
            self._files,
            count_cut=count_cut,
            gateway_pids=lambda: self.openai.pids if self.openai is not None else (),
        )
        self.openai = self._open_gateway(service)
        super().__init__(service, [self.grpc] if self.openai is None else [self.grpc, self.openai])

    def _open_gateway(self, service: Service) -> OpenAiFrontEnd | None:
        port, listener = service.config.openai_port, self.grpc.gateway_port
        if port is None or listener is None:
            return None
        return OpenAiFrontEnd(service, port, lambda: listener.address, self.report)

    def reload(self) -> None:
        """Read certificates and tokens again now; what cannot be used is not taken."""
        self._files.reload()
        if self.openai is not None:
            self.openai.reload()

    @property
    def address(self) -> str:
        """`HOST:PORT` of gRPC."""
        return self.grpc.address

    @property
    def port(self) -> int:
        """Port of gRPC, once bound."""
        return self.grpc.port


def _nothing(_seconds: float, _code: int) -> None:
    """Ends nothing: a program that embeds the server is not to be killed."""


async def serve(
    engine: AbstractAsyncContextManager[Engine],
    config: ServerConfig,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    telemetry: Telemetry | None = None,
    exit_within: ExitWithin = _nothing,
) -> None:
    """Serve `engine`, not entered yet, until a signal ends it. Prints `listening on HOST:PORT` once bound.

    Must run in the main thread, which alone can handle signals. `exit_within` is called when the end begins, with the
    seconds that it may take at most and the exit code for a process that hangs. SIGHUP reads certificates and tokens
    again. Metrics, log and spans are those of `telemetry`, made from `config` if None; its `observe_step` is for the
    engine.

    Raises:
        ConfigError: the address cannot be bound; or what entering the engine raises.
        EngineFaultError: the engine died; its streams have ended with UNAVAILABLE.
        SystemExit: a second signal came, or one while loading; 128 plus its number.
    """
    async with telemetry or Telemetry(config) as entered:
        server = Server(
            config,
            interceptors,
            entered.observers,
            entered.count_call,
            entered.count_failed_reload,
            count_cut=entered.count_cut,
        )
        await _serve(engine, server, entered, exit_within)


async def _serve(
    engine: AbstractAsyncContextManager[Engine], server: Server, telemetry: Telemetry, exit_within: ExitWithin
) -> None:
    await server.start()
    print(f"listening on {server.address}", flush=True)
    if server.openai is not None:
        print(f"OpenAI API on {server.openai.url}, once the model is loaded", flush=True)
    if telemetry.port is not None:
        _log.info("metrics on http://%s/metrics", join_address(server.config.metrics_host, telemetry.port))
    stopping = asyncio.Event()
    running = asyncio.create_task(_run(server, engine, telemetry, stopping))
    shutdown = _Shutdown(server, telemetry, running, stopping, exit_within)
    try:
        with _signal_handler(shutdown.on_signal), _hangup_handler(server.reload):
            await asyncio.wait({running})
        if shutdown.exit_code is not None:
            raise SystemExit(shutdown.exit_code)
        if running.cancelled() or running.exception():
            if not running.cancelled() and isinstance(running.exception(), EngineFaultError):
                exit_within(EXIT_SECONDS, 1)
            await server.fail()
        await running
    finally:
        running.cancel()
        await server.stop()
        await asyncio.wait({running})


async def _run(
    server: Server, engine: AbstractAsyncContextManager[Engine], telemetry: Telemetry, stopping: asyncio.Event
) -> None:
    async with engine as loaded:
        telemetry.attach(loaded)
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
    """The first signal while serving drains; any other ends the process now, with 128 plus its number."""

    def __init__(
        self,
        server: Server,
        telemetry: Telemetry,
        running: asyncio.Task[None],
        stopping: asyncio.Event,
        exit_within: ExitWithin,
    ) -> None:
        self.exit_code: int | None = None
        self._server = server
        self._telemetry = telemetry
        self._running = running
        self._stopping = stopping
        self._exit_within = exit_within

    def on_signal(self, number: int) -> None:
        phase = self._server.state.phase
        if phase is Phase.SERVING and not self._stopping.is_set():
            self._stopping.set()
            self._telemetry.end_within(self._server.config.drain_timeout)
            self._exit_within(self._server.config.drain_timeout + EXIT_SECONDS, 1)
        else:
            self.exit_code = 128 + number
            self._telemetry.end_within(0)
            self._exit_within(LOADING_EXIT_SECONDS if phase is Phase.LOADING else EXIT_SECONDS, self.exit_code)
            self._running.cancel()


@contextmanager
def _hangup_handler(reload: Callable[[], None]) -> Iterator[None]:
    """Call `reload` at SIGHUP; whoever had the signal before has it afterwards."""

    def on_hangup() -> None:
        _log.info("SIGHUP: certificates and tokens are read again")
        reload()

    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGHUP)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)


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
