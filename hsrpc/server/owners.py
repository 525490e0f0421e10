"""Which client each live request belongs to: nobody else may end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsrpc.server.errors import NotOwnerError
from hsrpc.server.grpc.caller import client_name


class Owners:
    """Names of the clients of live requests; all None where clients need not say who they are."""

    def __init__(self) -> None:
        self._names: dict[str, str | None] = {}

    @contextmanager
    def holding(self, request_id: str) -> Iterator[None]:
        """While the block runs the request belongs to the client whose call this is."""
        self._names[request_id] = client_name.get()
        try:
            yield
        finally:
            del self._names[request_id]

    def check(self, request_id: str) -> None:
        """Let pass the owner of a request, and anybody for an id that no request has.

        Raises:
            NotOwnerError: it belongs to another client.
        """
        caller = client_name.get()
        if self._names.get(request_id, caller) != caller:
            raise NotOwnerError("the request belongs to another client")
