"""Limits of connections, as channel arguments of gRPC. docs/security.md says what each is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsrpc.server.config import ServerConfig

_UNLIMITED_MS = 2**31 - 1
"""gRPC's own word for no limit."""
_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_PING_INTERVAL_MS = 10_000
_PING_STRIKES = 2


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """The arguments for the listener of the services."""
    security = config.security
    age = security.max_connection_age
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.max_connection_age_ms", int(age * 1000) or _UNLIMITED_MS),
        ("grpc.max_connection_age_grace_ms", _UNLIMITED_MS),  # no request ends because its connection is old
        *connection_options(security.handshake_timeout, security.max_metadata_bytes),
    ]


def connection_options(handshake_timeout: float, max_metadata_bytes: int) -> list[tuple[str, int]]:
    """What holds for every listener."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", int(handshake_timeout * 1000)),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
        ("grpc.max_metadata_size", max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", max_metadata_bytes),
    ]
