"""Settings of smg, from those of the server, and the secrets among them."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hsrpc.errors import ConfigError
from hsrpc.server.auth import read_holders, read_tokens
from hsrpc.server.certificates import check_pair
from hsrpc.server.config import ServerConfig
from hsrpc.server.reloaded_file import read_file
from hsrpc.server.security import SecurityConfig

PROBER = "hsrpc:probe"
"""Whose key the server's own probes bring: tokens belong to nobody of such a name."""
_REQUEST_SECONDS = 86_400
"""Time that a call may take, at most: as long as a time limit may be."""
_NO_HEADER = "x-hsrpc-request-id-is-made-here"
"""Ids of requests are the gateway's own: the server tells by them what was asked."""
_PARSERS = ("tool_call_parser", "reasoning_parser")


def check_gateway(config: ServerConfig) -> None:
    """Let pass settings that the gateway which is installed can have.

    Raises:
        ConfigError: none is installed, or it has no parser of a name.
    """
    if find_spec("smg") is None:
        remedy = "pip install 'hsrpc[gateway]', or leave it out"
        raise ConfigError("openai_port", config.openai_port, "smg is not installed", remedy)
    for name in _PARSERS:
        given = getattr(config, name)
        if given is not None and given not in (known := _known(name)):
            raise ConfigError(name, given, "smg has no such parser", f"use one of {', '.join(sorted(known))}")


def _known(parser: str) -> list[str]:
    """Names of the parsers of a kind, from a process of its own: what has them would stay in this one."""
    program = f"import json, smg.smg_rs; print(json.dumps(smg.smg_rs.get_available_{parser}s()))"
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)  # noqa: S603
    names: list[str] = json.loads(ran.stdout)
    return names


def secret_files(security: SecurityConfig) -> list[Path]:
    """Files of which `read_secrets` reads."""
    return [path for path in (security.auth_tokens, security.tls_cert, security.tls_key) if path is not None]


def read_secrets(security: SecurityConfig) -> bytes:
    """A digest of what the secret files hold: a gateway keeps those that it was started with.

    Raises:
        ConfigError: a file cannot be used.
    """
    digest = hashlib.sha256()
    if security.auth_tokens is not None:
        digest.update(repr(read_tokens(security.auth_tokens)).encode())
    if security.tls_cert is not None and security.tls_key is not None:
        check_pair(security.tls_cert, security.tls_key)
        digest.update(read_file(security.tls_cert, "tls_cert", secret=False))
        digest.update(read_file(security.tls_key, "tls_key", secret=True))
    return digest.digest()


def router_settings(
    config: ServerConfig, host: str, port: int, worker: str, *, names: Sequence[str], probe_key: str
) -> dict[str, object]:
    """Arguments of `smg.router_args.RouterArgs` for a gateway to one `worker`, whose model has these names.

    `host` is a numeric address.

    Where there are tokens, their holders alone reach the routes that serve; nobody reaches those that change the
    gateway. What would stand between a client and the server's own answer is off, such as retries.

    Raises:
        ConfigError: the tokens cannot be read.
    """
    security = config.security
    holders = {} if security.auth_tokens is None else read_holders(security.auth_tokens)
    keys = [(holder.name, token) for token, holder in holders.items()]
    return {
        "host": host,
        "port": port,
        "worker_urls": [f"grpc://{worker}"],
        "backend": "vllm",
        "policy": "round_robin",
        "model_aliases": dict.fromkeys(names[1:], names[0]),
        **{name: getattr(config, name) for name in _PARSERS},
        "tenant_api_keys": [*keys, (PROBER, probe_key)] if keys else [],
        "control_plane_api_keys": [("nobody", "nobody", secrets.token_urlsafe(), "admin")],
        "server_cert_path": _name(security.tls_cert),
        "server_key_path": _name(security.tls_key),
        "max_payload_size": config.max_message_bytes,
        "request_timeout_secs": _REQUEST_SECONDS,
        "shutdown_grace_period_secs": max(1, round(config.drain_timeout)),
        "request_id_headers": [_NO_HEADER],
        "worker_startup_check_interval": 1,
        "disable_retries": True,
        "disable_circuit_breaker": True,
        "worker_overload_protection": False,
        "history_backend": "none",
        "prometheus_host": "127.0.0.1",
        "prometheus_port": _free_port(),
        "log_level": "warn",
        "log_json": True,
    }


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _free_port() -> int:
    """For metrics, which smg always has: on the loopback they harm nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
