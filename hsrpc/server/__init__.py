"""The service over one engine; `serve` runs it. Needs the extra `hsrpc[engine]`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsrpc.server.app import Server, serve
    from hsrpc.server.config import ServerConfig

__all__ = ["Server", "ServerConfig", "serve"]

_HOMES = {"Server": "hsrpc.server.app", "ServerConfig": "hsrpc.server.config", "serve": "hsrpc.server.app"}


def __getattr__(name: str) -> object:
    """Load on first use, so that the use case can be had without gRPC."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
