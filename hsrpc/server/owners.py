"""Which client each live request belongs to: nobody else may end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsrpc.server.errors import NotOwnerError


class Owners:
    """Names of the clients of live requests; all None where clients need not say who they are."""

    def __init__(self) -> None:
        self._names: dict[str, str | None] = {}

    @contextmanager
    def holding(self, request_id: str, name: str | None) -> Iterator[None]:
        """While the block runs the request belongs to the client of that name."""
        self._names[request_id] = name
        try:
            yield
        finally:
            del self._names[request_id]

    def check(self, request_id: str, name: str | None) -> None:
        """Let pass a client that is the owner of a request, and anybody for an id that no request has.

        Raises:
            NotOwnerError: it belongs to another client.
        """
        if self._names.get(request_id, name) != name:
            raise NotOwnerError("the request belongs to another client")
