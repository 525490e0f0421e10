"""gRPC's name of the other end of a connection, and the host in it."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import unquote

from hsrpc.server.caller import canonical_host

_UNKNOWN = "unknown"


@lru_cache(maxsize=128)  # a connection has one name, and many calls; few, since names of closed ones stay
def peer_host(peer: str) -> str:
    """The host of a peer: ipv4:127.0.0.1:5 is 127.0.0.1, ipv6:%5B::1%5D:5 is ::1, unix:PATH stays, nothing is unknown.

    The port differs from connection to connection, and is left out.
    """
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer or _UNKNOWN
    plain = unquote(address) if address.startswith("%") else address  # a scope may look like a quoted letter
    return canonical_host(plain.rpartition(":")[0])
