"""gRPC's name of the other end of a connection, and the host and port in it."""

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
    address = peer_address(peer)
    return address[0] if address else peer or _UNKNOWN


def peer_address(peer: str) -> tuple[str, int] | None:
    """Host and port of a peer; None where it has none, as unix sockets have none."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    plain = unquote(address) if address.startswith("%") else address  # a scope may look like a quoted letter
    host, _, port = plain.rpartition(":")
    return (canonical_host(host), int(port)) if port.isdecimal() else None
