"""TLS and mutual TLS with real certificates: who gets in, and how certificates are replaced."""

from __future__ import annotations

import grpc
import pytest

from hsrpc.client import AsyncClient
from hsrpc.errors import ConfigError
from hsrpc.server import Server, ServerConfig, reloaded_file
from hsrpc.server.grpc import tls
from hsrpc.server.grpc.caller import client_name
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine
from tests.server.secured import ALONE, Authority, name_of_model, refusal, serving

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def authority(tmp_path) -> Authority:
    folder = tmp_path / "one"
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
def another(tmp_path) -> Authority:
    folder = tmp_path / "two"
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
def checked_at_once(monkeypatch):
    """Changed files are seen by the next connection or call."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)


async def test_tls_lets_in_who_trusts_the_server(authority):
    """A client with the authority's certificate talks; one in plain text does not."""
    async with serving(**authority.issue()) as server:
        assert await name_of_model(server, tls_ca=authority.roots) == "fake/model"
        assert (await refusal(server)).code is UNAVAILABLE


async def test_a_client_refuses_a_server_of_another_authority(authority, another):
    """The connection fails when the server's certificate comes from elsewhere."""
    async with serving(**authority.issue()) as server:
        assert (await refusal(server, tls_ca=another.roots)).code is UNAVAILABLE


async def test_a_client_refuses_an_expired_server(authority):
    """The connection fails when the server's certificate has expired."""
    async with serving(**authority.issue_expired()) as server:
        assert (await refusal(server, tls_ca=authority.roots)).code is UNAVAILABLE


async def test_mutual_tls_asks_for_a_certificate(authority, another):
    """Only clients with a valid certificate of the authority get in."""
    async with serving(**authority.issue(), tls_client_ca=authority.roots) as server:
        roots = {"tls_ca": authority.roots}
        assert await name_of_model(server, **roots, **authority.issue("client")) == "fake/model"
        for wrong in ({}, another.issue("client"), authority.issue_expired("client")):
            assert (await refusal(server, **roots, **wrong)).code is UNAVAILABLE


async def test_the_certificate_names_the_client(authority):
    """Under mutual TLS the services see the certificate's common name, in streams too."""
    seen = []

    class Engine(FakeEngine):
        async def submit(self, *args, **settings):
            seen.append(client_name.get())
            return await super().submit(*args, **settings)

    async with serving(Engine(), **authority.issue(), tls_client_ca=authority.roots) as server:
        for name in ("alice", "bob"):
            connection = {"tls_ca": authority.roots, "options": ALONE, **authority.issue(name)}
            async with AsyncClient(server.address, **connection) as client:
                await client.complete("Hi")
    assert seen == ["alice", "bob"]


async def test_certificates_are_replaced_while_serving(authority, another, checked_at_once):
    """New connections get the new certificate; those there are stay."""
    files = authority.issue()
    async with serving(**files) as server, AsyncClient(server.address, tls_ca=authority.roots, options=ALONE) as old:
        await old.get_model()
        for name, path in another.issue().items():
            files[name].write_bytes(path.read_bytes())
        assert await name_of_model(server, tls_ca=another.roots) == "fake/model"
        assert (await refusal(server, tls_ca=authority.roots)).code is UNAVAILABLE
        assert (await old.get_model()).name == "fake/model"


async def test_certificates_are_read_again_when_asked(authority, another, monkeypatch):
    """A reload does not wait for the next look at the files."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 1000.0)
    files = authority.issue()
    async with serving(**files) as server:
        for name, path in another.issue().items():
            files[name].write_bytes(path.read_bytes())
        assert await name_of_model(server, tls_ca=authority.roots) == "fake/model"
        server.reload()
        assert await name_of_model(server, tls_ca=another.roots) == "fake/model"


async def test_client_authorities_are_replaced_while_serving(authority, another, checked_at_once):
    """Whose clients get in changes with the file."""
    ca = authority.folder / "clients.pem"
    ca.write_bytes(authority.roots.read_bytes())
    mine, theirs = authority.issue("client"), another.issue("client")
    async with serving(**authority.issue(), tls_client_ca=ca) as server:
        await name_of_model(server, tls_ca=authority.roots, **mine)
        ca.write_bytes(another.roots.read_bytes())
        await name_of_model(server, tls_ca=authority.roots, **theirs)
        assert (await refusal(server, tls_ca=authority.roots, **mine)).code is UNAVAILABLE


async def test_a_half_replaced_pair_changes_nothing(authority, another, checked_at_once, caplog):
    """A certificate without its key is logged and not used; the pair is, once it is whole."""
    files, new = authority.issue(), another.issue()
    async with serving(**files) as server:
        files["tls_cert"].write_bytes(new["tls_cert"].read_bytes())
        await name_of_model(server, tls_ca=authority.roots)
        assert "what was read before stays" in caplog.text
        files["tls_key"].write_bytes(new["tls_key"].read_bytes())
        await name_of_model(server, tls_ca=another.roots)
    assert "PRIVATE KEY" not in caplog.text


def missing(files):
    files["tls_cert"].unlink()


def no_certificate(files):
    files["tls_cert"].write_text("not a certificate")


def key_of_another(files):
    files["tls_key"].write_bytes(Authority(files["tls_key"].parent).issue("other")["tls_key"].read_bytes())


def readable_key(files):
    files["tls_key"].chmod(0o644)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "tls_cert='.*': cannot be read"),
        (no_certificate, "tls_cert='.*': not a PEM certificate with its private key"),
        (key_of_another, "tls_cert='.*': not a PEM certificate with its private key"),
        (readable_key, "tls_key='.*': mode 644 lets others read or change it; run `chmod 600"),
    ],
)
async def test_what_cannot_be_used_is_said_before_serving(authority, damage, message):
    """A file that is missing, no certificate, of another pair or open to others keeps the server from starting."""
    files = authority.issue()
    damage(files)
    with pytest.raises(ConfigError, match=message):
        Server(ServerConfig(port=0, security=SecurityConfig(**files)))


async def test_a_pair_that_changes_while_it_is_read_is_not_used(authority, monkeypatch):
    """What is checked is what is used: a file written between the two is refused until the next look."""
    files = authority.issue()
    monkeypatch.setattr(tls, "check_pair", lambda *_: authority.issue())
    with pytest.raises(ConfigError, match=r"tls_cert='.*': changed while it was read"):
        Server(ServerConfig(port=0, security=SecurityConfig(**files)))


async def test_client_roots_without_a_certificate_are_refused(authority, tmp_path):
    """A file of client roots that holds none would lock everyone out, or let anyone in."""
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(ConfigError, match=r"tls_client_ca='.*': no PEM certificates"):
        Server(ServerConfig(port=0, security=SecurityConfig(**authority.issue(), tls_client_ca=empty)))
