"""The gRPC service over one engine; `serve` runs it. Needs the extra `hsrpc[engine]`."""

from hsrpc.server.app import serve
from hsrpc.server.config import ServerConfig
from hsrpc.server.grpc.listener import Server

__all__ = ["Server", "ServerConfig", "serve"]
