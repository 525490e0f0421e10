"""The errors that hsrpc raises on purpose: one small tree, each with what a person can do about it."""

from __future__ import annotations


class HsrpcError(Exception):
    """Base of every error that hsrpc raises on purpose."""


class ConfigError(HsrpcError):
    """A setting is wrong, alone or together with the machine or the model."""

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self._parts = (field, value, problem, remedy)
        super().__init__(f"{field}={value!r}: {problem}; {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[object, ...]]:
        """A process that found it may tell another."""
        return type(self), self._parts


class CheckpointError(HsrpcError):
    """A model directory cannot be served: names the file, the tensor, what was expected and found."""


class ModelNotFoundError(HsrpcError):
    """No model of that name here: neither a directory nor in the local hub cache."""


class InvalidRequestError(HsrpcError):
    """A request is wrong in one field; nothing was allocated for it."""

    def __init__(self, field: str, description: str) -> None:
        self.field = field
        self.description = description
        super().__init__(f"{field}: {description}")


class RequestExistsError(HsrpcError):
    """A live request has the same id already."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        super().__init__(f"request_id {request_id!r} belongs to a live request; use another id or none")


class QueueFullError(HsrpcError):
    """Too many requests, or tokens, wait already; try again later."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        """Seconds."""
        super().__init__(message)


class GaveWayError(QueueFullError):
    """The request waited in a full queue, and gave way to one of a client with fewer; try again later."""


class WaitTooLongError(QueueFullError):
    """The predicted wait is far longer than the request's deadline or time limit allows."""


class EngineUnavailableError(HsrpcError):
    """The engine is not started, or is shutting down, and takes no requests."""


class EngineFaultError(HsrpcError):
    """An engine task died; every running request ends with this."""


class OutOfDeviceMemoryError(HsrpcError):
    """A step ran out of device memory; its requests end with this, and the engine goes on."""


class RequestFailedError(HsrpcError):
    """One request could not go on; the others do."""


class NotFiniteError(RequestFailedError):
    """A request's logits are NaN or infinite: too large for the element type, or made of damaged weights."""

    def __init__(self, dtype: str) -> None:
        remedy = "serve the model with --dtype bfloat16" if dtype == "float16" else "fetch the model's files again"
        super().__init__(f"the model's logits for this request are not finite in {dtype}; {remedy}")
