"""What stands before the services: each call's client is named by its token or its certificate."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from hsrpc.server.auth import Authenticator
from hsrpc.server.errors import UnauthenticatedError
from hsrpc.server.failure import failure_of
from hsrpc.server.grpc.caller import client_name, max_priority
from hsrpc.server.grpc.status import abort
from hsrpc.server.observation import CountCall
from hsrpc.server.reloaded_file import ReloadedFiles
from hsrpc.server.security import SecurityConfig

_OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Health alone answers strangers."""
_SCHEME = "bearer"

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]


def auth_interceptors(
    config: SecurityConfig, files: ReloadedFiles, count: CountCall | None
) -> list[grpc.aio.ServerInterceptor]:
    """None where clients need not say who they are. `count` is told of refusals.

    Raises:
        ConfigError: the file of tokens cannot be used, or has none.
    """
    if config.auth_tokens is not None:
        return [TokenNames(config.auth_tokens, files, count)]
    return [CertificateNames()] if config.tls_client_ca else []


class TokenNames(grpc.aio.ServerInterceptor):
    """Lets in calls with a known token, and sets `client_name` and `max_priority` for them.

    Raises:
        ConfigError: on construction, when the file cannot be used or has no token.
    """

    def __init__(self, path: Path, files: ReloadedFiles, count: CountCall | None = None) -> None:
        self._authenticator = Authenticator(path, files)
        self._count = count

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method.startswith(_OPEN_PREFIX):
            return await continuation(handler_call_details)
        try:
            holder = self._authenticator.holder_of(_bearer_token(handler_call_details))
        except UnauthenticatedError as error:
            return self._refusal(error, handler_call_details.method)
        client_name.set(holder.name)  # each call is a task of its own
        max_priority.set(holder.max_priority)
        return await continuation(handler_call_details)

    def _refusal(self, error: UnauthenticatedError, method: str) -> Handler:
        """Ends the call before any of the request is read."""
        failure = failure_of(error, method)
        if self._count is not None:
            self._count(method.rpartition("/")[2], failure.kind)

        async def refuse(_: object, context: Context) -> None:
            await abort(context, failure)

        handler: Handler = grpc.stream_stream_rpc_method_handler(refuse)
        return handler


def _bearer_token(details: grpc.HandlerCallDetails) -> str | None:
    """The token of exactly one `authorization: Bearer TOKEN`."""
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    return token.strip() if scheme.lower() == _SCHEME else None


class CertificateNames(grpc.aio.ServerInterceptor):
    """Sets `client_name` from the certificate that the TLS handshake has verified."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            wrapped, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            wrapped, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        if not inspect.iscoroutinefunction(wrapped):
            return handler
        return make(_named(wrapped), handler.request_deserializer, handler.response_serializer)


def _named(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        client_name.set(certificate_name(context))
        return await behaviour(request, context)

    return call


def certificate_name(context: Context) -> str | None:
    """Common name of the client's certificate, or else its first alternative name."""
    found = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in found.get(key, ()):
            return value.decode("utf-8", errors="replace")
    return None
