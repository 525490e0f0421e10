"""From errors to gRPC statuses with google.rpc details. What is not listed here says nothing to the client."""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass
from functools import singledispatch

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from hsrpc.errors import (
    EngineFaultError,
    EngineUnavailableError,
    HsrpcError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestExistsError,
    WaitTooLongError,
)
from hsrpc.server.state import NotServingError, Phase

DOMAIN = "hsrpc"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
_RETRY_SECONDS = 1

_log = logging.getLogger(__name__)


class MalformedRequestError(HsrpcError):
    """The bytes of a request are not the message they should be."""


class NotSupportedError(HsrpcError):
    """A request asks for something that this server does not do."""

    def __init__(self, feature: str) -> None:
        self.feature = feature
        super().__init__(f"{feature} is not supported by this server; leave it out")


class NotOwnerError(HsrpcError):
    """A client means a request of another."""


class StalledClientError(HsrpcError):
    """A client left its stream unread."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ends that does not end well."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    pushback: float | None = None
    """Seconds after which a client that retries by itself may."""
    error_id: str | None = None
    """Under which the log has more."""

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The details as gRPC's rich error model carries them, and the pushback as its retry policy does."""
        pushback = () if self.pushback is None else ((PUSHBACK_KEY, str(math.ceil(1000 * self.pushback))),)
        return (*self._details_metadata(), *pushback)

    def _details_metadata(self) -> tuple[tuple[str, bytes], ...]:
        if not self.details:
            return ()
        status = Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        return ((DETAILS_KEY, status.SerializeToString()),)


def failure_of(error: Exception, method: str) -> Failure:
    """The status for `error`, raised while `method` was answered; an unforeseen one is logged under a new error id."""
    failure = _failure(error)
    if failure is not None:
        return failure
    error_id = uuid.uuid4().hex
    _log.error("%s failed, error id %s", method, error_id, exc_info=error)
    message = f"internal error {error_id}; the server's log has more under this id"
    return Failure(grpc.StatusCode.INTERNAL, message, (_info("INTERNAL", error_id=error_id),), error_id=error_id)


def _info(reason: str, **metadata: str) -> ErrorInfo:
    return ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _retry(seconds: float = _RETRY_SECONDS) -> RetryInfo:
    return RetryInfo(retry_delay=Duration(seconds=math.ceil(seconds)))


@singledispatch
def _failure(_: Exception) -> Failure | None:
    """The status of an error of a known type."""
    return None


@_failure.register
def _malformed(_: MalformedRequestError) -> Failure:
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, "the request is not a protobuf message of this method's type")


@_failure.register
def _invalid(error: InvalidRequestError) -> Failure:
    violation = BadRequest.FieldViolation(field=error.field, description=error.description)
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, str(error), (BadRequest(field_violations=[violation]),))


@_failure.register
def _exists(error: RequestExistsError) -> Failure:
    return Failure(grpc.StatusCode.ALREADY_EXISTS, str(error), (_info("REQUEST_EXISTS"),))


@_failure.register
def _queue_full(error: QueueFullError) -> Failure:
    return _over_quota(error, "the queue is full; try again later", "as many wait as may wait")


@_failure.register
def _wait_too_long(error: WaitTooLongError) -> Failure:
    message = "the queue is too long for the deadline or the time limit; give it longer, or try again later"
    return _over_quota(error, message, "the predicted wait is longer than the request may wait")


def _over_quota(error: QueueFullError, message: str, description: str) -> Failure:
    violation = QuotaFailure.Violation(subject="queued requests", description=description)
    details = (_retry(error.retry_after), QuotaFailure(violations=[violation]))
    return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, details, pushback=math.ceil(error.retry_after))


@_failure.register
def _out_of_memory(_: OutOfDeviceMemoryError) -> Failure:
    details = (_retry(), _info("OUT_OF_DEVICE_MEMORY"))
    return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the device ran out of memory; try again later", details)


@_failure.register
def _unavailable(_: EngineUnavailableError) -> Failure:
    return _try_again("the engine takes no requests now", "UNAVAILABLE")


@_failure.register
def _not_serving(error: NotServingError) -> Failure:
    return _try_again(error.phase.value, error.phase.name)


@_failure.register
def _engine_fault(_: EngineFaultError) -> Failure:
    return _try_again(Phase.FAILED.value, Phase.FAILED.name)


def _try_again(message: str, reason: str) -> Failure:
    return Failure(grpc.StatusCode.UNAVAILABLE, f"{message}; try again later", (_retry(), _info(reason)))


@_failure.register
def _model_not_found(_: ModelNotFoundError) -> Failure:
    message = "no such model here; leave `model` out, or name the one that GetModel returns"
    return Failure(grpc.StatusCode.NOT_FOUND, message, (_info("MODEL_NOT_FOUND"),))


@_failure.register
def _not_supported(error: NotSupportedError) -> Failure:
    return Failure(grpc.StatusCode.UNIMPLEMENTED, str(error), (_info("NOT_SUPPORTED", feature=error.feature),))


@_failure.register
def _stalled(_: StalledClientError) -> Failure:
    message = "the client left the stream unread for too long"
    return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, (_info("CLIENT_STALLED"),))


@_failure.register
def _not_owner(_: NotOwnerError) -> Failure:
    message = "the request belongs to another client; only that client may end it"
    return Failure(grpc.StatusCode.PERMISSION_DENIED, message, (_info("NOT_OWNER"),))
