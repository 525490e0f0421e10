"""Who calls, and how long the caller waits: what admission needs to know of a call beside its request."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsrpc.errors import InvalidRequestError

if TYPE_CHECKING:
    from hsrpc.server.grpc.handlers import Context

client_name: ContextVar[str | None] = ContextVar("client_name", default=None)
"""Name of the client whose call this is; None where clients need not say who they are."""

CLIENT_KEY = "x-hsrpc-client"
_CLIENT = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of the call that the current task answers."""

    client: str
    """Clients with the same key share one fair share."""
    time_remaining: float | None
    """Seconds until the call's deadline, as the call arrived; None: it has none."""


current_caller: ContextVar[Caller] = ContextVar("current_caller")
"""Set for each call, in the task that answers it."""


def read_caller(context: Context) -> Caller:
    """The caller, named by its token or certificate, else by the metadata `x-hsrpc-client`, else by its host.

    Raises:
        InvalidRequestError: the metadata is no name.
    """
    given = [str(value) for key, value in context.invocation_metadata() or () if key == CLIENT_KEY]
    if not all(map(_CLIENT.fullmatch, given)):
        raise InvalidRequestError(CLIENT_KEY, "no name; give 1 to 128 letters, digits or ._:@/- in the metadata")
    claimed = given[-1] if given else host_of(context.peer())
    return Caller(client_name.get() or claimed, context.time_remaining())


def host_of(peer: str) -> str:
    """The host in grpc's name of a peer, such as ipv4:127.0.0.1:40500, which has a port of its own each connection."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
