"""Flags of `hsrpc serve` for TLS, tokens, probes and connections."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from hsrpc.cli.options import SecondsOption
from hsrpc.server.security import SECURITY_TIMES, SecurityConfig


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `SecurityConfig`; each default is the dataclass's own."""
    group = parser.add_argument_group("security (docs/security.md)")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM; read again on change")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM, closed to others")
    group.add_argument("--tls-client-ca", type=Path, metavar="FILE", help="clients must show a certificate of these")
    group.add_argument(
        "--auth-tokens", type=Path, metavar="FILE", help="`name token [max-priority=N]` a line; calls must bring one"
    )
    group.add_argument(
        "--insecure", action="store_true", help="serve a --host that others reach without TLS or authentication"
    )
    group.add_argument("--health-port", type=int, metavar="N", help="health for probes, in plain text (default: none)")
    group.add_argument(
        "--no-reflection", dest="reflection", action="store_false", help="do not hand out the proto files"
    )
    group.add_argument(
        "--max-connection-age",
        type=SecondsOption(SECURITY_TIMES["max_connection_age"]),
        default=1800.0,
        metavar="SECONDS",
        help="have clients connect again; running calls go on; 0 is never (default: 1800)",
    )


def security_config(options: argparse.Namespace) -> SecurityConfig:
    """The security settings in parsed options.

    Raises:
        ConfigError: a setting is wrong.
    """
    names = [field.name for field in fields(SecurityConfig) if hasattr(options, field.name)]
    return SecurityConfig(**{name: getattr(options, name) for name in names})
