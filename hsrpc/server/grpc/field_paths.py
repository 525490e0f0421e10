"""Names of fields in errors, as the message of a request has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hsrpc.errors import InvalidRequestError


@contextmanager
def named_by(paths: Mapping[str, str]) -> Iterator[None]:
    """Errors that leave the block name fields by `paths`, where these have the engine's name for them."""
    try:
        yield
    except InvalidRequestError as error:
        name, bracket, index = error.field.partition("[")
        raise InvalidRequestError(paths.get(name, name) + bracket + index, error.description) from None
