"""Which settings may be put together, and which addresses may be served with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsrpc.errors import ConfigError
from hsrpc.server import ServerConfig
from hsrpc.server.security import SecurityConfig, is_loopback

CERT, KEY, CA, TOKENS = (Path(name) for name in ("cert.pem", "key.pem", "ca.pem", "tokens"))
TLS = {"tls_cert": CERT, "tls_key": KEY}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "serving.example.com", "2001:db8::1", ""])
@pytest.mark.parametrize(
    ("security", "missing"),
    [
        ({}, "encryption .* and authentication"),
        (TLS, "authentication"),
        ({"auth_tokens": TOKENS}, "encryption"),
    ],
)
def test_an_address_that_others_reach_needs_tls_and_authentication(host, security, missing):
    """The error names the address, what is missing, and the flag that lets it be."""
    with pytest.raises(ConfigError, match=f"host='{host}': other machines reach it without {missing}.*--insecure"):
        ServerConfig(host=host, security=SecurityConfig(**security))
    ServerConfig(host=host, security=SecurityConfig(**security, insecure=True))


@pytest.mark.parametrize("security", [TLS | {"auth_tokens": TOKENS}, TLS | {"tls_client_ca": CA}])
def test_with_both_any_address_may_be_served(security):
    """TLS with tokens, and mutual TLS, need no further word."""
    ServerConfig(host="0.0.0.0", security=SecurityConfig(**security))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_the_loopback_needs_nothing(host):
    """What only this machine reaches is served as it is; it is also the default."""
    assert is_loopback(host)
    assert is_loopback(ServerConfig(host=host).host)
    assert is_loopback(ServerConfig().host)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": CERT}, "tls_cert='cert.pem': given without tls_key"),
        ({"tls_key": KEY}, "tls_key='key.pem': given without tls_cert"),
        ({"tls_client_ca": CA}, "tls_client_ca='ca.pem': client certificates need TLS"),
        ({"health_port": 65_536}, "health_port=65536: not a port"),
        ({"max_connection_age": -1}, "max_connection_age=-1: not a time"),
        ({"max_connection_age": float("nan")}, "max_connection_age=nan: not a time"),
        ({"handshake_timeout": 0}, "handshake_timeout=0: not a time"),
        ({"max_metadata_bytes": 10}, "max_metadata_bytes=10: too small"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    """The error names the setting, its value and the remedy."""
    with pytest.raises(ConfigError, match=message):
        SecurityConfig(**settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7"])
@pytest.mark.parametrize(
    ("security", "missing"),
    [({}, "encryption .* and authentication"), (TLS | {"tls_client_ca": CA}, "authentication")],
)
def test_http_that_others_reach_needs_tls_and_tokens(host, security, missing):
    """Certificates of clients are none of its ways to know them."""
    with pytest.raises(ConfigError, match=f"openai_host='{host}': other machines reach it without {missing}"):
        ServerConfig(openai_port=0, openai_host=host, security=SecurityConfig(**security))
    for enough in (security | {"insecure": True}, TLS | {"auth_tokens": TOKENS}):
        ServerConfig(openai_port=0, openai_host=host, security=SecurityConfig(**enough))
    ServerConfig(openai_host=host, security=SecurityConfig(**security))


def test_http_on_the_loopback_asks_for_what_grpc_asks_for():
    """Where clients show certificates to gRPC, nobody gets in by HTTP for being on this machine."""
    with pytest.raises(ConfigError, match=r"openai_host='127\.0\.0\.1': clients there are known by tokens alone"):
        ServerConfig(openai_port=0, security=SecurityConfig(**TLS, tls_client_ca=CA))
    ServerConfig(openai_port=0, security=SecurityConfig(**TLS, tls_client_ca=CA, auth_tokens=TOKENS))
    ServerConfig(openai_port=0, security=SecurityConfig(**TLS, tls_client_ca=CA, insecure=True))
    ServerConfig(openai_port=0)
