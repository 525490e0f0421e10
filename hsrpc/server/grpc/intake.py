"""What stands before all services of a listener: requests come whole and in time, and early resets are counted."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from hsrpc.server.errors import (
    LateRequestError,
    MalformedRequestError,
    MessageCountError,
    NoSuchMethodError,
    StalledClientError,
)
from hsrpc.server.grpc.observation import RpcMethod, observed_call
from hsrpc.server.grpc.reading_places import ReadingPlaces
from hsrpc.server.grpc.resets import ResetLimit
from hsrpc.server.grpc.sending import Sender
from hsrpc.server.grpc.status import StatusBoundary
from hsrpc.server.observation import CountCall, FailureCounter

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
    Behaviour = Callable[[Any, Any], Awaitable[Any]]

_END = grpc.aio.EOF


class Intake(grpc.aio.ServerInterceptor):
    """Reads the requests of every service, which grpc itself would wait for without end, uncounted.

    The first interceptor of a listener: those behind it, and the services, have handlers of one request or of many as
    ever.
    """

    def __init__(
        self, request_timeout: float, sender: Sender, resets: ResetLimit, count: CountCall | None = None
    ) -> None:
        """`request_timeout`: seconds for each request. `count` is told of calls that end without one."""
        self._timeout = request_timeout
        self._sender = sender
        self._places = ReadingPlaces()
        self._resets = resets
        self._observers = [FailureCounter(count)] if count else []

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        service, _, name = handler_call_details.method.removeprefix("/").rpartition("/")
        answer = self._answer(handler, RpcMethod(service, name))
        resets = self._resets

        async def call(_: object, context: Context) -> Any:
            with resets.watched(context) as watched:
                return await answer(watched)

        if handler is None or handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call)
        return grpc.stream_unary_rpc_method_handler(call)

    def _answer(self, handler: Handler | None, method: RpcMethod) -> Callable[[Context], Awaitable[Any]]:
        """What is done with a call of `method`, which `handler` answers, if anything does."""

        async def one(context: Context) -> Any:
            return await behaviour(await self._request(context, method, parse), context)

        async def many(context: Context) -> Any:
            return await behaviour(self._requests(context, method, parse), context)

        async def none(context: Context) -> None:
            async with self._counted(context, method):
                raise NoSuchMethodError

        if handler is None:
            return none
        behaviour, parse = self._behaviour(handler, method), handler.request_deserializer
        return many if handler.request_streaming else one

    def _behaviour(self, handler: Handler, method: RpcMethod) -> Behaviour:
        """The handler's function; what those of other packages answer is sent as ours is, in time."""
        ways = ("unary", "stream")
        found: Any = getattr(handler, f"{ways[handler.request_streaming]}_{ways[handler.response_streaming]}")
        serialize: Any = handler.response_serializer

        async def write_all(request: Any, context: Context) -> None:
            try:
                async with self._sender.stream(context) as send, aclosing(found(request, context)) as responses:
                    async for response in responses:
                        await send(serialize(response))
            except StalledClientError:
                async with self._counted(context, method):
                    raise

        async def write_one(request: Any, context: Context) -> bytes:
            response = serialize(await found(request, context))
            async with self._counted(context, method):
                return await self._sender.last(context, response)

        if inspect.isasyncgenfunction(found):
            return write_all
        return write_one if serialize else found  # our own send by themselves

    async def _request(self, context: Context, method: RpcMethod, parse: Callable[[bytes], Any] | None) -> Any:
        async with self._reading(context, method):
            data = await context.read()
            if data is _END:
                raise MessageCountError("none")
            if await context.read() is not _END:
                raise MessageCountError("more")
            return _parsed(data, parse)

    async def _requests(
        self, context: Context, method: RpcMethod, parse: Callable[[bytes], Any] | None
    ) -> AsyncIterator[Any]:
        while True:
            async with self._reading(context, method):
                data = await context.read()
                request = data if data is _END else _parsed(data, parse)
            if request is _END:
                return
            yield request

    @asynccontextmanager
    async def _reading(self, context: Context, method: RpcMethod) -> AsyncIterator[None]:
        """A request is read in the block, in time, and where there is a place for it."""
        async with self._counted(context, method):
            try:
                async with (
                    asyncio.timeout(self._timeout) as limit,
                    self._places.place(context.peer(), partial(_end, limit)),
                ):
                    yield
            except TimeoutError:
                raise LateRequestError(self._timeout) from None

    @asynccontextmanager
    async def _counted(self, context: Context, method: RpcMethod) -> AsyncIterator[None]:
        """What goes wrong in the block ends the call with its status, and is counted."""
        with observed_call(self._observers, method, context) as call:
            async with StatusBoundary(method.name, context, call):
                yield


def _end(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(0)


def _parsed(data: bytes, parse: Callable[[bytes], Any] | None) -> Any:
    if parse is None:
        return data
    try:
        return parse(data)
    except DecodeError:
        raise MalformedRequestError("a protobuf message of this method's type") from None
