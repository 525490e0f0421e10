"""The gRPC server itself: services, health, reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from functools import partial

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection, reflection_pb2

from hsrpc.errors import ConfigError
from hsrpc.server.config import join_address
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.grpc.call_tasks import note_calls
from hsrpc.server.grpc.channel_options import channel_options
from hsrpc.server.grpc.connections import ConnectionCuts
from hsrpc.server.grpc.gateway_port import GatewayPort
from hsrpc.server.grpc.generation_service import GenerationService
from hsrpc.server.grpc.handlers import MakeHandler, service_handlers, streaming, unary
from hsrpc.server.grpc.health_port import HealthPort, bind
from hsrpc.server.grpc.health_service import HealthService
from hsrpc.server.grpc.intake import Intake
from hsrpc.server.grpc.interceptors import auth_interceptors
from hsrpc.server.grpc.model_service import ModelService
from hsrpc.server.grpc.resets import ResetLimit
from hsrpc.server.grpc.sending import Sender
from hsrpc.server.grpc.server_service import ServerService
from hsrpc.server.grpc.tls import server_credentials
from hsrpc.server.lifecycle import Health
from hsrpc.server.observation import CallCounter, CallObserver, CountCall, CountCut, CutReason
from hsrpc.server.readers import Readers
from hsrpc.server.reloaded_file import ReloadedFiles
from hsrpc.server.service import Service
from hsrpc.v1 import generation_pb2, model_pb2, server_pb2

GENERATION = "hsrpc.v1.GenerationService"
MODEL = "hsrpc.v1.ModelService"
SERVER = "hsrpc.v1.ServerService"
VLLM_ENGINE = "vllm.grpc.engine.VllmEngine"
HEALTH_NAMES = ("", GENERATION)
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcFrontEnd:
    """The gRPC server: services, health, reflection. A front end as `lifecycle.FrontEnd` has it."""

    def __init__(
        self,
        service: Service,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        observers: Sequence[CallObserver] = (),
        count_call: CountCall | None = None,
        files: ReloadedFiles | None = None,
        *,
        count_cut: CountCut | None = None,
        gateway_pids: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """`observers` are told of the calls of Generate, `count_call` of how each call of any method ended, `count_cut`
        of connections that are cut. Certificates and tokens are among `files` then. `gateway_pids` are the processes of
        gateways that the server runs, if it does.

        Raises:
            ConfigError: a file of the security settings cannot be used.
        """
        files = files or ReloadedFiles()
        config = self._config = service.config
        self.port = config.port
        cuts = ConnectionCuts(count_cut)
        self.sender = Sender(config, Readers(lambda peer, stalls: cuts.cut(peer, CutReason.STALLS, stalls)))
        self._health = HealthService()
        self._credentials = server_credentials(config.security, files)
        counters = [CallCounter(count_call)] if count_call else []
        intake = Intake(config.request_timeout, self.sender, ResetLimit(cuts), count_call)
        everyone = [intake, *auth_interceptors(config.security, files, count_call), *interceptors]
        self._grpc = grpc.aio.server(interceptors=everyone, options=channel_options(config))
        services = _services(service, self.sender, observers, counters)
        self._health_names: tuple[str, ...] = HEALTH_NAMES
        self.gateway_port: GatewayPort | None = None
        make_methods = partial(_vllm_methods, service, self.sender, observers, counters)
        if config.vllm_engine:
            services[VLLM_ENGINE] = make_methods(is_for_own_gateway=False)
            self._health_names += (VLLM_ENGINE,)
        if config.openai_port is not None:
            handlers = service_handlers(VLLM_ENGINE, make_methods(is_for_own_gateway=True))
            self.gateway_port = GatewayPort(config, handlers, intake, gateway_pids, count_call)
        self._grpc.add_generic_rpc_handlers([service_handlers(*each) for each in services.items()])
        self._grpc.add_generic_rpc_handlers([self._health.handlers()])
        if config.security.reflection:
            names = (*services, HEALTH_SERVICE, reflection.SERVICE_NAME)
            self._grpc.add_generic_rpc_handlers([_reflection_handlers(names)])
        self.health_port = HealthPort(self._health, config, intake)

    @property
    def address(self) -> str:
        return join_address(self._config.host, self.port)

    @property
    def is_ready(self) -> bool:
        return True

    async def start(self) -> None:
        """Bind and answer.

        Raises:
            ConfigError: the address cannot be bound.
        """
        note_calls()
        self.port = bind(self._grpc, "port", self._config.bind_address, self._credentials)
        await self.health_port.start()
        if self.gateway_port is not None:
            await self.gateway_port.start()
        await self._grpc.start()

    async def attach(self, engine: Engine) -> None:
        """Whatever engine there is, is served."""

    async def report(self, health: Health) -> None:
        """Set the health of the services; that of the whole server, under no name, has stalls and failures too."""
        for name in self._health_names:
            good = health.is_ready if name else health.is_alive
            self._health.set(name, _SERVING if good else _NOT_SERVING)

    async def stop(self, seconds: float) -> None:
        """Close the ports; calls that are left after `seconds` are cancelled."""
        async with asyncio.TaskGroup() as stopping:
            stopping.create_task(self._grpc.stop(seconds))
            if self.gateway_port is not None:
                stopping.create_task(self.gateway_port.stop(seconds))
        await self.health_port.stop()


def _reflection_handlers(names: Sequence[str]) -> grpc.GenericRpcHandler:
    """Not known to grpc by their names: it would keep the latest call of each, which then could not be reset."""
    info = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": info})


def _services(
    service: Service,
    sender: Sender,
    observers: Sequence[CallObserver],
    counters: Sequence[CallObserver],
) -> dict[str, dict[str, MakeHandler]]:
    generation, model, info = GenerationService(service), ModelService(service), ServerService(service)
    told = [*counters, *observers]
    return {
        GENERATION: {
            "Generate": streaming(generation_pb2.GenerateRequest, generation.generate, sender, told),
            "Abort": unary(generation_pb2.AbortRequest, generation.abort, sender, counters),
        },
        MODEL: {
            "GetModel": unary(model_pb2.GetModelRequest, model.get_model, sender, counters),
            "Tokenize": unary(model_pb2.TokenizeRequest, model.tokenize, sender, counters),
            "Detokenize": unary(model_pb2.DetokenizeRequest, model.detokenize, sender, counters),
        },
        SERVER: {
            "GetServerInfo": unary(server_pb2.GetServerInfoRequest, info.get_server_info, sender, counters),
            "WatchLoad": streaming(server_pb2.WatchLoadRequest, info.watch_load, sender, counters),
        },
    }


def _vllm_methods(
    service: Service,
    sender: Sender,
    observers: Sequence[CallObserver],
    counters: Sequence[CallObserver],
    *,
    is_for_own_gateway: bool,
) -> dict[str, MakeHandler]:
    """Those of VllmEngine.

    Raises:
        ConfigError: its stubs are not installed.
    """
    try:
        from hsrpc.server.grpc.vllm_service import vllm_methods
    except ModuleNotFoundError as error:
        remedy = "pip install 'hsrpc[gateway]', or leave it out"
        field = "openai_port" if is_for_own_gateway else "vllm_engine"
        problem = f"{error.name} is not installed"
        raise ConfigError(field, getattr(service.config, field), problem, remedy) from None
    return vllm_methods(service, sender, observers, counters, is_for_own_gateway=is_for_own_gateway)
