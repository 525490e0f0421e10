"""Who calls, and how long the caller waits: what the use case needs to know of a call beside its request."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of one call."""

    name: str | None
    """Proven by a token or a certificate: the owner of what it starts; None where clients need not say who they are."""
    client: str
    """Clients with the same key share one fair share: known by proof, or by the host."""
    time_remaining: float | None = None
    """Seconds until the call's deadline, as the call arrived; None: it has none."""
    user: str = ""
    """As the client says: its users with the same key share one part of its share."""
    max_priority: int | None = None
    """Most urgent that its requests may be; None: as for everybody."""


def canonical_host(host: str) -> str:
    """The one form of an address, such as 10.0.0.7, ::1 or fe80::1%eth0, in which shares, log and spans name a client.

    IPv6 may be in brackets and is compressed; an IPv4 address mapped into IPv6 is that address. Names stay as they are.
    """
    bare = host.strip("[]")
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return bare
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)
