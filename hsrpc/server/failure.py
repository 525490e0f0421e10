"""What a client is told when a call fails, whatever carries it. What is not listed here says nothing to the client."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import singledispatch

from hsrpc.errors import (
    EngineFaultError,
    EngineUnavailableError,
    GaveWayError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFiniteError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestExistsError,
    WaitTooLongError,
)
from hsrpc.server.errors import (
    CrowdedError,
    LateRequestError,
    MalformedRequestError,
    MessageCountError,
    NoSuchMethodError,
    NotOwnerError,
    NotSupportedError,
    StalledClientError,
    UnauthenticatedError,
)
from hsrpc.server.state import NotServingError, Phase

_RETRY_SECONDS = 1

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a call ends. The names are the canonical ones of google.rpc.Code; metrics, log and spans have them."""

    OK = "OK"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request, by its path, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """What there is too much of."""

    subject: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """The cause, for programs."""

    reason: str
    """A word in capitals, such as NOT_OWNER."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ends that does not end well; details that do not apply are None."""

    kind: Outcome
    message: str
    violation: FieldViolation | None = None
    retry_delay: int | None = None
    """Seconds after which the client may try again."""
    quota: QuotaViolation | None = None
    info: ErrorInfo | None = None

    @property
    def error_id(self) -> str | None:
        """Id under which the log has more."""
        return self.info.metadata.get("error_id") if self.info else None


def failure_of(error: Exception, method: str) -> Failure:
    """The failure for `error`, raised while `method` was answered; an unforeseen one is logged under a new error id."""
    failure = _failure(error)
    if failure is not None:
        return failure
    error_id = uuid.uuid4().hex
    _log.error("%s failed, error id %s", method, error_id, exc_info=error)
    message = f"internal error {error_id}; the server's log has more under this id"
    return Failure(Outcome.INTERNAL, message, info=ErrorInfo("INTERNAL", {"error_id": error_id}))


@singledispatch
def _failure(_: Exception) -> Failure | None:
    """The failure for an error of a known type."""
    return None


@_failure.register
def _malformed(error: MalformedRequestError) -> Failure:
    return Failure(Outcome.INVALID_ARGUMENT, str(error))


@_failure.register
def _late(error: LateRequestError) -> Failure:
    return Failure(Outcome.DEADLINE_EXCEEDED, str(error), info=ErrorInfo("REQUEST_LATE"))


@_failure.register
def _crowded(error: CrowdedError) -> Failure:
    info = ErrorInfo("CROWDED")
    return Failure(Outcome.RESOURCE_EXHAUSTED, str(error), retry_delay=_RETRY_SECONDS, info=info)


@_failure.register
def _message_count(error: MessageCountError) -> Failure:
    return Failure(Outcome.UNIMPLEMENTED, str(error), info=ErrorInfo("MESSAGE_COUNT"))


@_failure.register
def _no_such_method(error: NoSuchMethodError) -> Failure:
    return Failure(Outcome.UNIMPLEMENTED, str(error), info=ErrorInfo("NO_SUCH_METHOD"))


@_failure.register
def _invalid(error: InvalidRequestError) -> Failure:
    violation = FieldViolation(error.field, error.description)
    return Failure(Outcome.INVALID_ARGUMENT, str(error), violation)


@_failure.register
def _exists(error: RequestExistsError) -> Failure:
    return Failure(Outcome.ALREADY_EXISTS, str(error), info=ErrorInfo("REQUEST_EXISTS"))


@_failure.register
def _queue_full(error: QueueFullError) -> Failure:
    return _over_quota(error, "the queue is full; try again later", "as many wait as may wait")


@_failure.register
def _wait_too_long(error: WaitTooLongError) -> Failure:
    message = "the queue is too long for the deadline or the time limit; give it longer, or try again later"
    return _over_quota(error, message, "the predicted wait is longer than the request may wait")


@_failure.register
def _gave_way(error: GaveWayError) -> Failure:
    message = "the queue is full, and the request gave way to another client's, which has fewer there; try again later"
    return _over_quota(error, message, "more of the client's wait than its share of a full queue")


def _over_quota(error: QueueFullError, message: str, description: str) -> Failure:
    quota = QuotaViolation("queued requests", description)
    return Failure(Outcome.RESOURCE_EXHAUSTED, message, retry_delay=math.ceil(error.retry_after), quota=quota)


@_failure.register
def _out_of_memory(_: OutOfDeviceMemoryError) -> Failure:
    message, info = "the device ran out of memory; try again later", ErrorInfo("OUT_OF_DEVICE_MEMORY")
    return Failure(Outcome.RESOURCE_EXHAUSTED, message, retry_delay=_RETRY_SECONDS, info=info)


@_failure.register
def _not_finite(error: NotFiniteError) -> Failure:
    return Failure(Outcome.INTERNAL, str(error), info=ErrorInfo("NOT_FINITE"))


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
    message, info = f"{message}; try again later", ErrorInfo(reason)
    return Failure(Outcome.UNAVAILABLE, message, retry_delay=_RETRY_SECONDS, info=info)


@_failure.register
def _model_not_found(_: ModelNotFoundError) -> Failure:
    message = "no such model here; leave `model` out, or name the one that GetModel returns"
    return Failure(Outcome.NOT_FOUND, message, info=ErrorInfo("MODEL_NOT_FOUND"))


@_failure.register
def _not_supported(error: NotSupportedError) -> Failure:
    return Failure(Outcome.UNIMPLEMENTED, str(error), info=ErrorInfo("NOT_SUPPORTED", {"feature": error.feature}))


@_failure.register
def _stalled(_: StalledClientError) -> Failure:
    message = "the client left the stream unread for too long"
    return Failure(Outcome.RESOURCE_EXHAUSTED, message, info=ErrorInfo("CLIENT_STALLED"))


@_failure.register
def _unauthenticated(error: UnauthenticatedError) -> Failure:
    remedy = "send `authorization: Bearer TOKEN` with a token that the server's operator gave you"
    return Failure(Outcome.UNAUTHENTICATED, f"{error.problem}; {remedy}", info=ErrorInfo("UNAUTHENTICATED"))


@_failure.register
def _not_owner(_: NotOwnerError) -> Failure:
    message = "the request belongs to another client; only that client may end it"
    return Failure(Outcome.PERMISSION_DENIED, message, info=ErrorInfo("NOT_OWNER"))
