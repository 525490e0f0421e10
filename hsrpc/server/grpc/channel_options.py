"""Limits of connections, as channel arguments of gRPC. docs/security.md says what each is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsrpc.server.config import ServerConfig
    from hsrpc.server.security import SecurityConfig

_UNLIMITED_MS = 2**31 - 1
"""gRPC's own word for no limit."""
_PING_INTERVAL_MS = 10_000
_PING_STRIKES = 2
_READ_AHEAD = 16 * 1024
"""Bytes of a message that gRPC takes before somebody reads it; a connection of 4096 calls that wait holds 64 MiB."""
_MAX_PENDING = 32_768
"""Calls that wait for the event loop, 14 KB each: those of eight connections. gRPC answers more with CANCELLED."""


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """The arguments for the listener of the services."""
    security = config.security
    age = security.max_connection_age
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.max_connection_age_ms", _milliseconds(age) or _UNLIMITED_MS),
        ("grpc.max_connection_age_grace_ms", _UNLIMITED_MS),  # no request ends because its connection is old
        *connection_options(security),
    ]


def connection_options(security: SecurityConfig) -> list[tuple[str, int]]:
    """What holds for every listener."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _milliseconds(security.handshake_timeout)),
        ("grpc.keepalive_time_ms", _milliseconds(security.keepalive_time)),
        ("grpc.keepalive_timeout_ms", _milliseconds(security.keepalive_timeout)),
        # Without it gRPC waits a minute for the answer to a ping, whatever the keepalive timeout is.
        ("grpc.http2.ping_timeout_ms", _milliseconds(security.keepalive_timeout)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
        ("grpc.http2.lookahead_bytes", _READ_AHEAD),
        ("grpc.http2.bdp_probe", 0),  # else whoever sends fast is let send much ahead, on every stream
        # gRPC would cancel some of all calls beyond a thousand, whoever fills the queue, be it with calls long dead.
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
        ("grpc.max_metadata_size", security.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", security.max_metadata_bytes),
    ]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
