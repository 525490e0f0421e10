"""The health service of gRPC: whoever does not read what he watches keeps nobody else from the news."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class HealthService:
    """Methods of grpc.health.v1.Health."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": health_pb2.HealthCheckResponse.SERVING}
        self._changed = asyncio.Event()
        """Set, and replaced, at each change."""

    def set(self, service: str, status: int) -> None:
        """Tell those who ask, and those who watch."""
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a listener is given; grpc keeps the latest call of each method that it knows by name."""
        ways = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, *ways),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, *ways),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def _check(self, request: Any, context: Context) -> Any:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, 'no such service here; ask for "", the whole server')
        return health_pb2.HealthCheckResponse(status=status)

    async def _watch(self, request: Any, _: Context) -> AsyncIterator[Any]:
        """The status at once, and whenever it has become another."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()
