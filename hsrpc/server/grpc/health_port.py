"""Health on a port of its own, in plain text: for probes that know neither certificates nor tokens."""

from __future__ import annotations

import logging

import grpc

from hsrpc.errors import ConfigError
from hsrpc.server.config import ServerConfig, join_address
from hsrpc.server.grpc.channel_options import connection_options
from hsrpc.server.grpc.health_service import HealthService
from hsrpc.server.grpc.intake import Intake

_MAX_MESSAGE_BYTES = 4096
_MAX_STREAMS = 64

_log = logging.getLogger(__name__)


class HealthPort:
    """A listener for `health` alone, behind `intake`, if the configuration has a port for it."""

    def __init__(self, health: HealthService, config: ServerConfig, intake: Intake) -> None:
        self.port = config.security.health_port
        self._host = config.host
        limits = [
            *connection_options(config.security),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ]
        self._grpc = grpc.aio.server(interceptors=[intake], options=limits)
        self._grpc.add_generic_rpc_handlers([health.handlers()])

    async def start(self) -> None:
        """Bind and answer, if there is a port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        if self.port is None:
            return
        self.port = bind(self._grpc, "health_port", join_address(self._host, self.port), None)
        _log.info("health answers on %s", join_address(self._host, self.port))
        await self._grpc.start()

    async def stop(self) -> None:
        """Close the port at once."""
        await self._grpc.stop(None)


def bind(server: grpc.aio.Server, field: str, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """The port that is bound; without `credentials` it speaks plain text.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(field, address, "cannot be bound", "take an address of this machine and a free port")
    return port
