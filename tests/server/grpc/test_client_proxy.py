"""Clients where the environment names a proxy: a server on this machine is reached without it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from hsrpc.client import NO_RETRIES, AsyncClient, CallError, Client
from hsrpc.client_proxy import is_loopback, proxy_to

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
NOBODY = "http://user:secret@127.0.0.1:9"
"""Where no proxy listens."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy but those of a test."""
    for name in (*VARIABLES, "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", VARIABLES)
async def test_a_server_on_this_machine_is_reached(server, monkeypatch, variable):
    """Whichever variable names a proxy, and however the loopback is written."""
    monkeypatch.setenv(variable, NOBODY)
    port = server.address.rpartition(":")[2]
    for target in (f"127.0.0.1:{port}", f"localhost:{port}", f"ipv4:127.0.0.1:{port}", f"dns:///localhost:{port}"):
        async with AsyncClient(target) as client:
            assert (await client.get_model()).name == "fake/model"

    def sync() -> str:
        with Client(server.address) as client:
            return client.get_model().name

    assert await asyncio.to_thread(sync) == "fake/model"


async def test_the_callers_own_option_counts(server, monkeypatch):
    """Who asks for the proxy on the loopback gets it."""
    monkeypatch.setenv("http_proxy", NOBODY)
    async with AsyncClient(server.address, options=[("grpc.enable_http_proxy", 1)]) as client:
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await client.get_model()


@pytest.mark.parametrize("variable", VARIABLES)
async def test_a_refused_connection_names_the_proxy(monkeypatch, variable):
    """Variable, value without user and password, and remedy; in calls and in streams, sync and async."""
    monkeypatch.setenv(variable, NOBODY)
    message = (
        f"calls to it go through a proxy, as {variable}=http://127.0.0.1:9 in the environment says; "
        "if they should not, add models.test to no_proxy"
    )
    async with AsyncClient("models.test:50051", options=NO_RETRIES) as client:
        for call in (client.get_model(), client.complete("Hi")):
            with pytest.raises(CallError) as caught:
                await call
            assert caught.value.message.endswith(message)
            assert "secret" not in str(caught.value)
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE

    def sync() -> None:
        with Client("models.test:50051", options=NO_RETRIES) as client, pytest.raises(CallError, match="to no_proxy"):
            client.complete("Hi")

    await asyncio.to_thread(sync)


async def test_what_a_server_says_is_not_blamed_on_the_proxy(loading_server, monkeypatch):
    """A model that loads is not out of reach."""
    monkeypatch.setattr("hsrpc.client.proxy_to", lambda _: "the proxy")
    async with AsyncClient(loading_server.address, options=NO_RETRIES) as client:
        with pytest.raises(CallError, match="the model is loading") as caught:
            await client.get_model()
    assert "the proxy" not in caught.value.message


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        *((target, True) for target in ("localhost:1", "127.0.0.1:1", "127.1.2.3", "[::1]:1", "ipv6:[::1]:1")),
        *((target, True) for target in ("dns:///localhost:1", "dns:localhost", "LOCALHOST:1", "0.0.0.0:1", "[::]:1")),
        *((target, False) for target in ("models.test:1", "10.0.0.1:1", "[fd00::1]:1", "unix:///run/x", "[", "")),
    ],
)
def test_targets_on_this_machine(target, expected):
    """All ways to write the loopback, and nothing else."""
    assert is_loopback(target) is expected


@pytest.mark.parametrize(
    ("exceptions", "expected"),
    [("", True), ("other.test", True), ("a, models.test", False), (".test", False), ("10.0.0.0/8", True)],
)
def test_exceptions_are_those_of_grpc(monkeypatch, exceptions, expected):
    """A host that no_proxy excepts is reached directly, and no proxy is blamed."""
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.setenv("no_proxy", exceptions)
    assert (proxy_to("models.test:1") is not None) is expected
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy_to("10.1.2.3:1") is None


def test_the_variable_that_counts_is_named(monkeypatch):
    """Where no_grpc_proxy is set, gRPC does not look at no_proxy."""
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_grpc_proxy", "elsewhere.test")
    assert str(proxy_to("models.test:1")).endswith(
        "as https_proxy=http://proxy.test:3128 in the environment says; "
        "if they should not, add models.test to no_grpc_proxy"
    )
