"""The gRPC server itself: services, health, reflection, and the order in which they go up and down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hsrpc.server.config import ServerConfig, join_address
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.grpc.channel_options import channel_options
from hsrpc.server.grpc.generation_service import GenerationService
from hsrpc.server.grpc.handlers import streaming, unary
from hsrpc.server.grpc.health_port import HealthPort, bind
from hsrpc.server.grpc.interceptors import auth_interceptors
from hsrpc.server.grpc.model_service import ModelService
from hsrpc.server.grpc.server_service import ServerService
from hsrpc.server.grpc.tls import server_credentials
from hsrpc.server.liveness import watch_steps
from hsrpc.server.observation import CallCounter, CallObserver, CountCall
from hsrpc.server.service import Service
from hsrpc.server.state import Phase
from hsrpc.v1 import generation_pb2, model_pb2, server_pb2

GENERATION = "hsrpc.v1.GenerationService"
MODEL = "hsrpc.v1.ModelService"
SERVER = "hsrpc.v1.ServerService"
HEALTH_NAMES = ("", GENERATION)
_LAST_WORDS = 1.0
"""Seconds that calls have to send their status once the server stops."""

_log = logging.getLogger(__name__)


class Server:
    """Listens from `start` on; takes requests from `attach` to `drain`. All on one event loop."""

    def __init__(
        self,
        config: ServerConfig,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        observers: Sequence[CallObserver] = (),
        count_call: CountCall | None = None,
    ) -> None:
        """`observers` are told of the calls of Generate, `count_call` of how each call of any method ended."""
        self.config = config
        self.service = Service(config)
        self.state = self.service.state
        self.port = config.port
        self._health = health.aio.HealthServicer()
        self._liveness: asyncio.Task[None] | None = None
        self._credentials = server_credentials(config.security)
        counters = [CallCounter(count_call)] if count_call else []
        everyone = [*auth_interceptors(config.security, count_call), *interceptors]
        self._grpc = grpc.aio.server(interceptors=everyone, options=channel_options(config))
        self._grpc.add_generic_rpc_handlers(_service_handlers(self.service, config, observers, counters))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.security.reflection:
            names = (GENERATION, MODEL, SERVER, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self.health_port = HealthPort(self._health, config)

    @property
    def address(self) -> str:
        return join_address(self.config.host, self.port)

    async def start(self) -> None:
        """Bind and answer; requests are UNAVAILABLE until an engine is attached.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self.port = bind(self._grpc, "port", self.config.bind_address, self._credentials)
        await self._set_health(serving=False)
        await self.health_port.start()
        await self._grpc.start()

    async def attach(self, engine: Engine) -> None:
        """Take requests for `engine`, which has started."""
        self.state.attach(engine)
        await self._set_health(serving=True)
        self._liveness = asyncio.create_task(watch_steps(engine, self.config.step_timeout, self._set_alive))

    async def _set_alive(self, alive: bool) -> None:
        if self.state.phase is Phase.SERVING:
            await self._health.set("", _status(serving=alive))

    async def drain(self) -> None:
        """Take no more requests, and wait for those there are, at most `drain_timeout` s."""
        self.state.enter(Phase.DRAINING)
        await self._set_health(serving=False)
        await self._wait_idle(self.config.drain_timeout)
        self.state.expel()
        await self._wait_idle(_LAST_WORDS / 2)

    async def fail(self) -> None:
        """The engine is dead: take no more requests, and let those there are hear of it."""
        self.state.enter(Phase.FAILED)
        await self._set_health(serving=False)
        await self._wait_idle(_LAST_WORDS / 2)

    async def stop(self) -> None:
        """Cancel what is left, and close the port."""
        self.state.enter(Phase.DRAINING)
        await self._set_health(serving=False)
        await self._grpc.stop(_LAST_WORDS / 2)
        await self.health_port.stop()

    async def _wait_idle(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.state.wait_idle(), seconds)
        except TimeoutError:
            _log.warning("requests still run after %s s and are ended", seconds)

    async def _set_health(self, *, serving: bool) -> None:
        if self._liveness is not None and not serving:
            self._liveness.cancel()  # what does not serve needs no watching
        for name in HEALTH_NAMES:
            await self._health.set(name, _status(serving=serving))


def _status(*, serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
    statuses = health_pb2.HealthCheckResponse
    return statuses.SERVING if serving else statuses.NOT_SERVING


def _service_handlers(
    service: Service,
    config: ServerConfig,
    observers: Sequence[CallObserver],
    counters: Sequence[CallObserver],
) -> list[grpc.GenericRpcHandler]:
    generation, model, info = GenerationService(service), ModelService(service), ServerService(service)
    wait, told = config.write_timeout, [*counters, *observers]
    methods = {
        GENERATION: {
            "Generate": streaming(generation_pb2.GenerateRequest, generation.generate, wait, told),
            "Abort": unary(generation_pb2.AbortRequest, generation.abort, counters),
        },
        MODEL: {
            "GetModel": unary(model_pb2.GetModelRequest, model.get_model, counters),
            "Tokenize": unary(model_pb2.TokenizeRequest, model.tokenize, counters),
            "Detokenize": unary(model_pb2.DetokenizeRequest, model.detokenize, counters),
        },
        SERVER: {
            "GetServerInfo": unary(server_pb2.GetServerInfoRequest, info.get_server_info, counters),
            "WatchLoad": streaming(server_pb2.WatchLoadRequest, info.watch_load, wait, counters),
        },
    }
    return [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in methods.items()]
