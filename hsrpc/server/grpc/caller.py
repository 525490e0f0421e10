"""Who calls, read from a call's context: proven, claimed, or known by its host alone."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hsrpc.errors import InvalidRequestError
from hsrpc.server.caller import Caller
from hsrpc.server.grpc.peer import peer_host

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_CLIENT_KEY = "x-hsrpc-client"
_CLIENT = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")

client_name: ContextVar[str | None] = ContextVar("client_name", default=None)
"""Name of the client whose call this is; None where clients need not say who they are."""
max_priority: ContextVar[int | None] = ContextVar("max_priority", default=None)
"""Most urgent priority that the call's token grants; None: as for everybody."""
current_caller: ContextVar[Caller] = ContextVar("current_caller")
"""Set for each call, in the task that answers it."""


def read_caller(context: Context) -> Caller:
    """The caller: a client by its token or certificate, else by its host; its user, by the metadata `x-hsrpc-client`.

    Raises:
        InvalidRequestError: the metadata is no name.
    """
    given = [str(value) for key, value in context.invocation_metadata() or () if key == _CLIENT_KEY]
    if not all(map(_CLIENT.fullmatch, given)):
        raise InvalidRequestError(_CLIENT_KEY, "no name; give 1 to 128 letters, digits or ._:@/- in the metadata")
    proven = client_name.get()
    client = proven or peer_host(context.peer())
    user = given[-1] if given else ""
    return Caller(proven, client, context.time_remaining(), user, max_priority.get())


def proven_client(context: Context) -> str:
    """The client as log and spans name it: by its token or certificate, else by its host; claims are left out."""
    return client_name.get() or peer_host(context.peer())
