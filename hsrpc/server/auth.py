"""Who calls: bearer tokens from a file, names from tokens or certificates. Only health answers strangers."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo

from hsrpc.errors import ConfigError
from hsrpc.server.grpc.status import DOMAIN, Failure
from hsrpc.server.reloaded_file import Watched, read_file
from hsrpc.server.security import SecurityConfig

client_name: ContextVar[str | None] = ContextVar("client_name", default=None)
"""Name of the client whose call this is; None where clients need not say who they are."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")
_OPEN_PREFIX = "/grpc.health.v1.Health/"
_SCHEME = "bearer"
_REPORT_SECONDS = 10.0

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    CountCall = Callable[[str, grpc.StatusCode], object]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Names by the SHA-256 of their tokens: digests have one length, and the tokens themselves are not kept."""

    entries: tuple[tuple[bytes, str], ...]

    def name_of(self, token: str) -> str | None:
        """The client that `token` belongs to. Takes as long whichever entry it is, and for none."""
        digest = _digest(token)
        found = None
        for known, name in self.entries:
            if hmac.compare_digest(known, digest):
                found = name
        return found


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file with `name token` a line; `#` begins a comment line, a name may have several tokens.

    Raises:
        ConfigError: it cannot be read, others may read it, or a line is wrong; the message has no token.
    """
    names: dict[bytes, str] = {}
    data = read_file(path, "auth_tokens", secret=True).decode("utf-8", errors="replace")
    for number, line in enumerate(data.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or not _TOKEN.fullmatch(words[1]):
            remedy = "write `name token`: 1 to 64 of A-Z a-z 0-9 . _ @ -, and 16 to 512 of A-Z a-z 0-9 . _ ~ + / -"
            raise ConfigError("auth_tokens", str(path), f"line {number} is no name and token", remedy)
        name, digest = words[0], _digest(words[1])
        if names.setdefault(digest, name) != name:
            problem = f"line {number} has the token of {names[digest]!r}"
            raise ConfigError("auth_tokens", str(path), problem, "give each client a token of its own")
    return Tokens(tuple(names.items()))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def auth_interceptors(config: SecurityConfig, count: CountCall | None) -> list[grpc.aio.ServerInterceptor]:
    """What stands before the services: nothing where clients need not say who they are. `count` is told of refusals.

    Raises:
        ConfigError: the file of tokens cannot be used, or has none.
    """
    if config.auth_tokens is not None:
        return [TokenAuth(config.auth_tokens, count)]
    return [CertificateNames()] if config.tls_client_ca else []


class TokenAuth(grpc.aio.ServerInterceptor):
    """Lets in calls with a known token, and sets `client_name` for them.

    Raises:
        ConfigError: on construction, when the file cannot be used or has no token.
    """

    def __init__(self, path: Path, count: CountCall | None = None) -> None:
        self._count = count
        self._tokens = Watched([path], lambda: read_tokens(path))
        self._refused = 0
        self._reported = -math.inf
        if not self._tokens.current().entries:
            raise ConfigError("auth_tokens", str(path), "no tokens in it", "add a line `name token` for each client")

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method.startswith(_OPEN_PREFIX):
            return await continuation(handler_call_details)
        token = _bearer_token(handler_call_details)
        name = self._tokens.current().name_of(token) if token else None
        if name is None:
            self._count_refusal(handler_call_details.method)
            return _refusal("the token is unknown" if token else "no token")
        client_name.set(name)  # each call is a task of its own
        return await continuation(handler_call_details)

    def _count_refusal(self, method: str) -> None:
        """Log refusals, one line for all those of some seconds: strangers must not fill the disk."""
        if self._count is not None:
            self._count(method.rpartition("/")[2], grpc.StatusCode.UNAUTHENTICATED)
        self._refused += 1
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            _log.warning("%d calls refused for want of a known token", self._refused)
            self._refused, self._reported = 0, time.monotonic()


def _bearer_token(details: grpc.HandlerCallDetails) -> str | None:
    """The token of exactly one `authorization: Bearer TOKEN`."""
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    return token.strip() if scheme.lower() == _SCHEME else None


def _refusal(problem: str) -> Handler:
    """Ends the call before any of the request is read."""
    message = f"{problem}; send `authorization: Bearer TOKEN` with a token that the server's operator gave you"
    info = ErrorInfo(reason="UNAUTHENTICATED", domain=DOMAIN)
    failure = Failure(grpc.StatusCode.UNAUTHENTICATED, message, (info,))

    async def refuse(_: object, context: Context) -> None:
        await context.abort(failure.code, failure.message, failure.trailing_metadata())

    handler: Handler = grpc.stream_stream_rpc_method_handler(refuse)
    return handler


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
