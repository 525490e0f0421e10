"""TLS and mutual TLS, with certificates that are replaced while the server runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from hsrpc.errors import ConfigError
from hsrpc.server.certificates import check_pair
from hsrpc.server.reloaded_file import ReloadedFiles, read_file
from hsrpc.server.security import SecurityConfig


def server_credentials(config: SecurityConfig, files: ReloadedFiles) -> grpc.ServerCredentials | None:
    """Credentials that take new connections with the files' present content; None without TLS.

    Raises:
        ConfigError: a file cannot be read, or is not what it should be.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    paths = [cert, key] + ([client_ca] if client_ca else [])
    reloaded = files.watch(paths, lambda: _load(cert, key, client_ca))
    return grpc.dynamic_ssl_server_credentials(
        reloaded.current(), reloaded.current, require_client_authentication=client_ca is not None
    )


def _load(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, private = _read_pair(cert, key)
    roots = read_file(client_ca, "tls_client_ca", secret=False) if client_ca else None
    check_pair(cert, key)
    if _read_pair(cert, key) != (chain, private):
        raise ConfigError("tls_cert", str(cert), "changed while it was read", "replace files by renaming")
    if roots is not None:
        _check_roots(roots, str(client_ca))
    return grpc.ssl_server_certificate_configuration([(private, chain)], roots)


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    return read_file(cert, "tls_cert", secret=False), read_file(key, "tls_key", secret=True)


def _check_roots(roots: bytes, path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError):
        raise ConfigError("tls_client_ca", path, "no PEM certificates", "give the roots of the clients") from None
