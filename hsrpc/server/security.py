"""Who may reach the server, and how: TLS, tokens, probes, and the rule for addresses that others can reach."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from hsrpc.config import Seconds
from hsrpc.errors import ConfigError

SECURITY_TIMES = {
    "handshake_timeout": Seconds(0.001),
    "keepalive_time": Seconds(0.001),
    "keepalive_timeout": Seconds(0.001),
    "max_connection_age": Seconds(0.001, has_never=True),
}
"""What the times of `SecurityConfig` may be; gRPC counts whole milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Settings of transport and authentication. Files are read when the server is made, and again when they change.

    Raises:
        ConfigError: on construction, naming the field, its value and the remedy.
    """

    tls_cert: Path | None = None
    """PEM file: the server's certificate, and those between it and its root."""
    tls_key: Path | None = None
    """PEM file: the certificate's private key, without a passphrase."""
    tls_client_ca: Path | None = None
    """PEM file: roots of which every client must show a certificate."""
    auth_tokens: Path | None = None
    """A `name token [max-priority=N]` a line: every call but health must bring one of the tokens."""
    insecure: bool = False
    """Serve an address that others can reach without TLS or without authentication."""
    health_port: int | None = None
    """Port of a second listener, in plain text, that answers health checks alone; 0 takes a free one."""
    reflection: bool = True
    """Whether clients may ask for the proto files."""
    handshake_timeout: float = 10.0
    """Seconds that a connection has to finish its TLS and HTTP/2 handshakes."""
    keepalive_time: float = 30.0
    """Seconds without a word from the client after which it is asked whether it is still there."""
    keepalive_timeout: float = 10.0
    """Seconds that it has to answer; then the connection is closed and its calls end."""
    max_connection_age: float = 1800.0
    """Seconds after which a client is told to connect again; running calls go on. 0: never."""
    max_metadata_bytes: int = 16 * 1024
    """Most metadata that a call may bring, bytes."""

    def __post_init__(self) -> None:
        self._check_tls()
        for name, allowed in SECURITY_TIMES.items():
            allowed.check(name, getattr(self, name))
        if self.max_metadata_bytes < 1024:
            remedy = "give 1024 or more; gRPC's own headers take some hundred"
            raise ConfigError("max_metadata_bytes", self.max_metadata_bytes, "too small for any call", remedy)
        if self.health_port is not None and not 0 <= self.health_port <= 65_535:
            raise ConfigError("health_port", self.health_port, "not a port", "give 0 to 65535")

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigError(given, str(getattr(self, given)), f"given without {missing}", "give both, or neither")
        if self.tls_client_ca and not self.tls:
            problem = "client certificates need TLS"
            raise ConfigError("tls_client_ca", str(self.tls_client_ca), problem, "give tls_cert and tls_key too")

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls_cert is not None

    @property
    def authenticates(self) -> bool:
        """Whether a client must prove who it is."""
        return self.auth_tokens is not None or self.tls_client_ca is not None

    def check_exposure(self, host: str) -> None:
        """Let pass an address that only this machine reaches, or one where clients are known and nobody listens in.

        Raises:
            ConfigError: others reach `host`, and TLS or authentication is missing, and `insecure` is not set.
        """
        authentication = [] if self.authenticates else ["authentication (--auth-tokens or --tls-client-ca)"]
        self._check_exposure("host", host, authentication)

    def check_http_exposure(self, host: str) -> None:
        """The same for HTTP, where clients are known by tokens alone.

        Raises:
            ConfigError: as `check_exposure`; or clients are known by certificates otherwise, and would not be here.
        """
        missing = [] if self.auth_tokens is not None else ["authentication (--auth-tokens)"]
        self._check_exposure("openai_host", host, missing)
        if self.tls_client_ca is not None and missing and not self.insecure:
            problem = "clients there are known by tokens alone, and there are only certificates"
            raise ConfigError("openai_host", host, problem, "add --auth-tokens, or --insecure to let everybody in")

    def _check_exposure(self, field: str, host: str, missing: list[str]) -> None:
        missing = [*([] if self.tls else ["encryption (--tls-cert, --tls-key)"]), *missing]
        if missing and not self.insecure and not is_loopback(host):
            remedy = "add it, or --insecure where the network itself keeps others out"
            raise ConfigError(field, host, f"other machines reach it without {' and '.join(missing)}", remedy)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; of names, this is certain of localhost alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
