"""Flags with which a command reaches a server that asks for TLS or a token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypedDict

from hsrpc.errors import ConfigError


class ConnectionSettings(TypedDict):
    """Keyword arguments of `Client` and `AsyncClient`."""

    token: str | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None


def add_connection_options(parser: argparse.ArgumentParser, *, target: str | None, target_help: str) -> None:
    """The flags. The token comes from a file, since other users of a machine see the arguments of a command."""
    group = parser.add_argument_group("connection")
    group.add_argument("--target", default=target, metavar="HOST:PORT", help=f"default: {target_help}")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="bearer token, alone in the file")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="roots of the server's certificate, PEM")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate to show, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")


def connection_settings(options: argparse.Namespace) -> ConnectionSettings:
    """What the flags say.

    Raises:
        ConfigError: the token's file is empty or not text, or a certificate comes without its key.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("tls_cert", str(options.tls_cert), "certificate and key go together", "give both, or neither")
    return ConnectionSettings(
        token=_read_token(options.token_file) if options.token_file else None,
        tls_ca=options.tls_ca,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
    )


def _read_token(file: Path) -> str:
    token = file.read_bytes().decode("ascii", errors="replace").strip()
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise ConfigError("token_file", str(file), "not a token alone", "write the token, and nothing else, into it")
    return token
