"""Which failures of a request are its own, which pass, and which end the batch."""

from __future__ import annotations

import asyncio
import time

from hsrpc.batch.call import Call
from hsrpc.batch.refusal import FAILED, BatchError, Refusal
from hsrpc.client_messages import CallError
from hsrpc.errors import (
    HsrpcError,
    InvalidRequestError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestFailedError,
)

MAX_ATTEMPTS = 4
"""Times that a request which fails by chance is sent."""
_FIRST_WAIT, _MAX_WAIT = 0.25, 30.0
"""Seconds; they double with each attempt."""
_FATAL = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_REFUSED = ("INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE", "FAILED_PRECONDITION")


class ChanceError(HsrpcError):
    """A failure that may be this request's alone, and may not come again."""


class BusyError(HsrpcError):
    """As many wait as may wait; there will be room."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds; None: nobody said."""


class GoneError(HsrpcError):
    """The server is not there, or not ready; all requests fail so now."""


def failure_of(error: HsrpcError, call: Call) -> Refusal | HsrpcError:
    """The refusal of a line whose request ended with `error`; or one of the errors above, after which it goes again.

    Raises:
        HsrpcError: `error` itself, which all requests would end with.
    """
    match error:
        case ChanceError():
            return error
        case InvalidRequestError():
            return Refusal.of(InvalidRequestError(call.field(error.field), error.description))
        case QueueFullError():
            return BusyError(str(error), error.retry_after)
        case OutOfDeviceMemoryError():
            return ChanceError(str(error))
        case RequestFailedError():
            return Refusal(500, str(error), FAILED)
        case CallError():
            return _failure_of_call(error, call)
    raise error


def _failure_of_call(error: CallError, call: Call) -> Refusal | HsrpcError:
    code = error.code.name
    if code in _FATAL:
        raise error
    if code in _REFUSED or "larger than max" in error.message:  # the latter are gRPC's words for a prompt too long
        return Refusal(400, error.message)
    if code == "NOT_FOUND":
        return Refusal(404, error.message, param="model", code="model_not_found")
    if code == "UNAVAILABLE":
        return GoneError(str(error))
    if code == "RESOURCE_EXHAUSTED" and error.reason is None:
        return BusyError(str(error), error.retry_after)
    if error.reason == "NOT_FINITE":
        return Refusal(500, error.message, FAILED)
    return ChanceError(str(error))


class Retries:
    """Waits before a request is sent again; gives up on a server that has been gone for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.count = 0
        self._seconds = seconds
        self._gone_since: float | None = None

    def note_alive(self) -> None:
        """Some request has output."""
        self._gone_since = None

    async def wait(self, failure: HsrpcError, attempt: int) -> None:
        """Wait after failure number `attempt` of a request, counted from 1.

        Raises:
            BatchError: it is time to give up.
        """
        self.count += 1
        if isinstance(failure, GoneError):
            now = time.monotonic()
            self._gone_since = self._gone_since or now
            if now - self._gone_since > self._seconds:
                raise BatchError(f"{failure}; that has been so for {self._seconds:.0f} s (--retry-seconds)")
        asked = failure.retry_after if isinstance(failure, BusyError) else None
        await asyncio.sleep(asked or min(_MAX_WAIT, _FIRST_WAIT * 2.0 ** min(attempt - 1, 16)))
