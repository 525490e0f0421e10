"""A failure as gRPC says it: a status code, and google.rpc details in the trailing metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as rpc
from google.rpc.status_pb2 import Status

from hsrpc.server.errors import StreamResetError
from hsrpc.server.failure import Failure, Outcome, failure_of
from hsrpc.server.observation import ObservedCall

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_DOMAIN = "hsrpc"
_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


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
            if isinstance(error, StreamResetError):
                raise asyncio.CancelledError("the stream is reset") from None
            try:
                await abort(self._context, failure)
            except grpc.aio.InternalError:
                raise gone() from None


def gone() -> asyncio.CancelledError:
    """What nobody is there to take cannot be sent: the call was cancelled, and grpc has yet to say so."""
    return asyncio.CancelledError("the client is gone")


async def abort(context: Context, failure: Failure) -> None:
    """End the call with `failure`; raises, as `context.abort` does."""
    await context.abort(status_code(failure.kind), failure.message, trailing_metadata(failure))


def status_code(outcome: Outcome) -> grpc.StatusCode:
    """The code of the same name."""
    return grpc.StatusCode[outcome.name]


def trailing_metadata(failure: Failure) -> tuple[tuple[str, str | bytes], ...]:
    """The details as gRPC's rich error model carries them.

    The delay of what is over a quota is there too as gRPC's retry policy reads it: clients that retry by themselves
    heed it.
    """
    details = list(_details(failure))
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if details:
        status = Status(code=status_code(failure.kind).value[0], message=failure.message)
        for detail in details:
            status.details.add().Pack(detail)
        metadata += ((_DETAILS_KEY, status.SerializeToString()),)
    if failure.quota and failure.retry_delay is not None:
        metadata += ((_PUSHBACK_KEY, str(1000 * failure.retry_delay)),)
    return metadata


def _details(failure: Failure) -> Iterator[Message]:
    if found := failure.violation:
        violation = rpc.BadRequest.FieldViolation(field=found.field, description=found.description)
        yield rpc.BadRequest(field_violations=[violation])
    if failure.retry_delay is not None:
        yield rpc.RetryInfo(retry_delay=Duration(seconds=failure.retry_delay))
    if quota := failure.quota:
        over = rpc.QuotaFailure.Violation(subject=quota.subject, description=quota.description)
        yield rpc.QuotaFailure(violations=[over])
    if info := failure.info:
        yield rpc.ErrorInfo(reason=info.reason, domain=_DOMAIN, metadata=info.metadata)
