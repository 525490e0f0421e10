"""What each error becomes for a client, before any transport says it."""

from __future__ import annotations

import logging

import pytest

from hsrpc.errors import (
    CheckpointError,
    EngineFaultError,
    EngineUnavailableError,
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
    MalformedRequestError,
    NotOwnerError,
    NotSupportedError,
    StalledClientError,
    UnauthenticatedError,
)
from hsrpc.server.failure import FieldViolation, Outcome, failure_of
from hsrpc.server.state import NotServingError, Phase


@pytest.mark.parametrize(
    ("error", "kind", "reason", "delay"),
    [
        (MalformedRequestError("a message"), "INVALID_ARGUMENT", None, None),
        (InvalidRequestError("stop[1]", "empty"), "INVALID_ARGUMENT", None, None),
        (RequestExistsError("r"), "ALREADY_EXISTS", "REQUEST_EXISTS", None),
        (QueueFullError("secret", retry_after=2.1), "RESOURCE_EXHAUSTED", None, 3),
        (WaitTooLongError("secret", retry_after=9.0), "RESOURCE_EXHAUSTED", None, 9),
        (OutOfDeviceMemoryError("secret"), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICE_MEMORY", 1),
        (NotFiniteError("float16"), "INTERNAL", "NOT_FINITE", None),
        (EngineUnavailableError("secret"), "UNAVAILABLE", "UNAVAILABLE", 1),
        (NotServingError(Phase.DRAINING), "UNAVAILABLE", "DRAINING", 1),
        (EngineFaultError("secret"), "UNAVAILABLE", "FAILED", 1),
        (ModelNotFoundError("secret"), "NOT_FOUND", "MODEL_NOT_FOUND", None),
        (NotSupportedError("a field"), "UNIMPLEMENTED", "NOT_SUPPORTED", None),
        (CrowdedError(), "RESOURCE_EXHAUSTED", "CROWDED", 1),
        (StalledClientError("secret"), "RESOURCE_EXHAUSTED", "CLIENT_STALLED", None),
        (UnauthenticatedError("no token"), "UNAUTHENTICATED", "UNAUTHENTICATED", None),
        (NotOwnerError("secret"), "PERMISSION_DENIED", "NOT_OWNER", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_foreseen_error_has_its_failure(error, kind, reason, delay):
    """The kind, the reason for programs and when to come back; what the error itself says of the inside is left out."""
    failure = failure_of(error, "Generate")
    assert (failure.kind, failure.retry_delay) == (Outcome(kind), delay)
    assert (failure.info.reason if failure.info else None) == reason
    assert (failure.quota is not None) == isinstance(error, QueueFullError)
    assert "secret" not in repr(failure)
    assert failure.error_id is None


def test_a_wrong_field_is_named():
    """By its path, with what is wrong with it."""
    failure = failure_of(InvalidRequestError("stop[1]", "empty"), "Generate")
    assert failure.violation == FieldViolation("stop[1]", "empty")


@pytest.mark.parametrize("error", [ValueError("secret"), CheckpointError("secret")])
def test_what_is_not_foreseen_is_in_the_log_alone(error, caplog):
    """The client gets an id; the log has the error, the method and the id."""
    with caplog.at_level(logging.ERROR):
        failure = failure_of(error, "Generate")
    assert (failure.kind, failure.retry_delay) == (Outcome.INTERNAL, None)
    assert failure.error_id is not None
    assert failure.error_id in failure.message
    assert "secret" not in repr(failure)
    assert f"Generate failed, error id {failure.error_id}" in caplog.text
    assert "secret" in caplog.text
