"""Method handlers: bytes to message, method, and a status for whatever goes wrong on the way.

Requests are parsed here and not by grpc, which answers malformed ones with UNKNOWN and Python's exception text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from hsrpc.server.errors import MalformedRequestError, NotSupportedError
from hsrpc.server.grpc.caller import current_caller, read_caller
from hsrpc.server.grpc.observation import RpcMethod, observed_call
from hsrpc.server.grpc.sending import Sender
from hsrpc.server.grpc.status import StatusBoundary
from hsrpc.server.observation import CallObserver

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]

MakeHandler: TypeAlias = "Callable[[RpcMethod], Handler]"
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Response_contra = TypeVar("Response_contra", bound=Message, contravariant=True)


class Write(Protocol[Response_contra]):
    """Sends one message of a stream, of which it keeps the bytes; wait for it until there is room for more."""

    def __call__(self, message: Response_contra, /) -> Awaitable[None]: ...


def unary(
    request_type: type[Request],
    method: Callable[[Request], Awaitable[Message]],
    sender: Sender,
    observers: Sequence[CallObserver] = (),
) -> MakeHandler:
    """Makes the handler of one request and one response, of the method that calls come by."""

    def make(called: RpcMethod) -> Handler:
        async def handle(data: bytes, context: Context) -> bytes:
            with observed_call(observers, called, context) as call:
                async with StatusBoundary(request_type.DESCRIPTOR.full_name, context, call):
                    current_caller.set(read_caller(context))
                    response = await method(parse(request_type, data))
                    return await sender.last(context, response.SerializeToString())
            raise AssertionError("a boundary lets no exception vanish")

        return grpc.unary_unary_rpc_method_handler(handle)

    return make


def streaming(
    request_type: type[Request],
    method: Callable[[Request, Write[Response]], Awaitable[None]],
    sender: Sender,
    observers: Sequence[CallObserver] = (),
) -> MakeHandler:
    """Makes the handler of one request and a stream of responses, of the method that calls come by."""

    def make(called: RpcMethod) -> Handler:
        async def handle(data: bytes, context: Context) -> None:
            with observed_call(observers, called, context) as call:
                async with (
                    StatusBoundary(request_type.DESCRIPTOR.full_name, context, call),
                    sender.stream(context) as send,
                ):
                    current_caller.set(read_caller(context))
                    await method(parse(request_type, data), lambda message: send(message.SerializeToString()))

        return grpc.unary_stream_rpc_method_handler(handle)

    return make


def service_handlers(service: str, methods: Mapping[str, MakeHandler]) -> grpc.GenericRpcHandler:
    """What a listener is given; grpc itself is told no names: it would keep the latest call of each method."""
    handlers = {name: make(RpcMethod(service, name)) for name, make in methods.items()}
    return grpc.method_handlers_generic_handler(service, handlers)


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
