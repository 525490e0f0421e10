"""Why a line has no output, as OpenAI's API tells it."""

from __future__ import annotations

from dataclasses import dataclass

from hsrpc.errors import HsrpcError, InvalidRequestError

INVALID = "invalid_request_error"
FAILED = "server_error"


class BatchError(HsrpcError):
    """A batch cannot go on, whatever its other lines hold."""


class UnservedError(InvalidRequestError):
    """A parameter of OpenAI's that is not served, or of nobody's."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the API would have answered: an error object, and the status of its response."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None

    def as_json(self) -> dict[str, object]:
        """The body of a response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @classmethod
    def of(cls, error: InvalidRequestError) -> Refusal:
        """The refusal of a body for one of its fields."""
        code = "unsupported_parameter" if isinstance(error, UnservedError) else None
        return cls(400, str(error), param=error.field, code=code)

    @classmethod
    def of_model(cls, model: str, served: str) -> Refusal:
        """The refusal of a body that names another model."""
        message = f"model: {model!r} is not served here; give {served!r}"
        return cls(404, message, param="model", code="model_not_found")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line itself, of which no request could be made: an error of a batch's validation."""

    code: str
    message: str
    line: int
    param: str | None = None

    def as_json(self) -> dict[str, object]:
        """The `error` of a line of output."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}
