"""Method handlers: bytes to message, method, and a status for whatever goes wrong on the way.

Requests are parsed here and not by grpc, which answers malformed ones with UNKNOWN and Python's exception text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from hsrpc.server.errors import MalformedRequestError, NotSupportedError
from hsrpc.server.failure import failure_of
from hsrpc.server.grpc.caller import current_caller, read_caller
from hsrpc.server.grpc.observation import RpcMethod, observed_call
from hsrpc.server.grpc.status import abort
from hsrpc.server.observation import CallObserver, ObservedCall
from hsrpc.server.stall_timeout import StallTimeout

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, Message]
    Handler = grpc.RpcMethodHandler[bytes, Message]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Response_contra = TypeVar("Response_contra", bound=Message, contravariant=True)


class Write(Protocol[Response_contra]):
    """Sends one message of a stream; returns once the transport has room for more."""

    async def __call__(self, message: Response_contra, /) -> None: ...


class StatusBoundary:
    """An exception that leaves the block ends the call with its status; cancellation passes."""

    def __init__(self, method: str, context: Context, call: ObservedCall | None = None) -> None:
        self._method = method
        self._context = context
        self._call = call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            failure = failure_of(error, self._method)
            if self._call is not None:
                self._call.fail(failure, error)
            try:
                await abort(self._context, failure)
            except grpc.aio.InternalError:
                raise _gone() from None


def unary(
    request_type: type[Request],
    method: Callable[[Request], Awaitable[Message]],
    observers: Sequence[CallObserver] = (),
) -> Handler:
    """A handler of one request and one response."""
    called = _method(request_type)

    async def handle(data: bytes, context: Context) -> Message:
        with observed_call(observers, called, context) as call:
            async with StatusBoundary(request_type.DESCRIPTOR.full_name, context, call):
                current_caller.set(read_caller(context))
                return await method(parse(request_type, data))
        raise AssertionError("a boundary lets no exception vanish")

    return grpc.unary_unary_rpc_method_handler(handle, response_serializer=_serialize)


def streaming(
    request_type: type[Request],
    method: Callable[[Request, Write[Response]], Awaitable[None]],
    write_timeout: float,
    observers: Sequence[CallObserver] = (),
) -> Handler:
    """A handler of one request and a stream of responses, each to be taken by the client within `write_timeout` s."""
    called = _method(request_type)

    async def handle(data: bytes, context: Context) -> None:
        limit = StallTimeout(write_timeout)

        async def write(message: Response) -> None:
            try:
                await limit.wait(context.write(message))
            except grpc.aio.InternalError:
                raise _gone() from None

        with observed_call(observers, called, context) as call:
            async with StatusBoundary(request_type.DESCRIPTOR.full_name, context, call), limit:
                current_caller.set(read_caller(context))
                await method(parse(request_type, data), write)

    return grpc.unary_stream_rpc_method_handler(handle, response_serializer=_serialize)


def _gone() -> asyncio.CancelledError:
    """What nobody is there to take cannot be sent: the call was cancelled, and grpc has yet to say so."""
    return asyncio.CancelledError("the client is gone")


def _method(request_type: type[Message]) -> RpcMethod:
    """The method that takes such requests: each has a type of its own."""
    taken = request_type.DESCRIPTOR
    [method] = [
        RpcMethod(service.full_name, method.name)
        for service in taken.file.services_by_name.values()
        for method in service.methods
        if method.input_type is taken
    ]
    return method


def parse(request_type: type[Request], data: bytes) -> Request:
    """The message in `data`.

    Raises:
        MalformedRequestError: it is none of this type.
        NotSupportedError: it has fields that this server does not know.
    """
    try:
        request = request_type.FromString(data)
    except DecodeError:
        raise MalformedRequestError("a protobuf message of this method's type") from None
    _refuse_unknown_fields(request)
    return request


def _refuse_unknown_fields(message: Message) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise NotSupportedError(f"field {unknown[0].field_number} of {message.DESCRIPTOR.full_name}")
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for part in _parts(value):
                _refuse_unknown_fields(part)


def _parts(value: Any) -> Iterable[Message]:
    """The messages in a field, which may be repeated or a map of whatever."""
    if isinstance(value, Message):
        return (value,)
    parts = value.values() if isinstance(value, Mapping) else value
    return (part for part in parts if isinstance(part, Message))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
