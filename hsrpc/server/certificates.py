"""Certificates and private keys in files."""

from __future__ import annotations

import ssl
from pathlib import Path

from hsrpc.errors import ConfigError


def check_pair(cert: Path, key: Path) -> None:
    """Let pass a certificate and its own private key: servers would find out at the first handshake only.

    Raises:
        ConfigError: they are none, or no pair.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError, ValueError):
        problem = f"not a PEM certificate with its private key in {str(key)!r}"
        raise ConfigError("tls_cert", str(cert), problem, "give both as PEM, the key without a passphrase") from None
