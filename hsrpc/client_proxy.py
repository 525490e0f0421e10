"""The HTTP proxy that the environment puts between a client and its server."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy; the first that is set counts, for every call."""
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
"""Where it looks for what it reaches directly: ends of host names and networks, between commas."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that calls to `host` go through."""

    host: str
    variable: str
    exceptions: str
    """The variable to name `host` in, if it is to be reached directly."""
    address: str
    """Value of `variable` without user and password."""

    def __str__(self) -> str:
        return (
            f"calls to it go through a proxy, as {self.variable}={self.address} in the environment says; "
            f"if they should not, add {self.host} to {self.exceptions}"
        )


def proxy_to(target: str) -> Proxy | None:
    """The proxy on the way to `target`; None: there is none, or the target is on this machine."""
    host = _host(target)
    variable = next((name for name in _VARIABLES if os.environ.get(name)), None)
    exceptions = next((name for name in _EXCEPTIONS if os.environ.get(name)), _EXCEPTIONS[-1])
    if variable is None or not host or is_loopback(target) or _excepted(host, os.environ.get(exceptions, "")):
        return None
    return Proxy(host, variable, exceptions, _without_credentials(os.environ[variable]))


def is_loopback(target: str) -> bool:
    """Whether `target`, a name as gRPC takes them, is on this machine, where no proxy can reach it."""
    host = _host(target)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address = ip_address(host)
        return address.is_loopback or address.is_unspecified
    return False


def _host(target: str) -> str:
    """The host in host:port, dns:///host:port, ipv4:host:port and their like; empty where there is none."""
    address = target.rpartition("/")[2]
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    with suppress(ValueError):
        return urlsplit(f"//{address}").hostname or ""
    return ""


def _excepted(host: str, exceptions: str) -> bool:
    return any(_covers(entry.strip(), host) for entry in exceptions.split(",") if entry.strip())


def _covers(entry: str, host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host) in ip_network(entry, strict=False)
    return host.endswith(entry.lower())


def _without_credentials(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]
