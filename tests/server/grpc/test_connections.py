"""Connections are cut by the name that gRPC has for their other end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from hsrpc.server.grpc.connections import cut
from hsrpc.server.grpc.peer import peer_address

PATIENCE = 10
"""Seconds."""


@contextmanager
def connection(host: str, listens_on: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener's end and a client's, whose address is of `host`."""
    with (
        socket.create_server(
            (listens_on, 0),
            family=socket.AF_INET6 if ":" in listens_on else socket.AF_INET,
            dualstack_ipv6=listens_on == "::",
        ) as listener,
        socket.create_connection((host, listener.getsockname()[1]), PATIENCE) as client,
    ):
        accepted, _ = listener.accept()
        with accepted:
            yield accepted, client


def is_cut(client: socket.socket) -> bool:
    client.settimeout(0.05)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("host", "listens_on", "peer"),
    [
        ("127.0.0.1", "127.0.0.1", "ipv4:127.0.0.1:{}"),
        ("127.0.0.1", "::", "ipv4:127.0.0.1:{}"),
        ("127.0.0.1", "::", "ipv6:%5B::ffff:127.0.0.1%5D:{}"),
        ("::1", "::1", "ipv6:%5B::1%5D:{}"),
        ("::1", "::1", "ipv6:[::1%lo]:{}"),
    ],
)
def test_the_named_connection_is_cut_and_no_other(host, listens_on, peer):
    """IPv4, IPv6, one in the other, with a scope: the client reads the end; its neighbour does not."""
    with connection(host, listens_on) as (_, client), connection(host, listens_on) as (_, other):
        assert cut(peer.format(client.getsockname()[1]))
        assert is_cut(client)
        assert not is_cut(other)


def test_what_this_process_has_connected_to_is_not_cut():
    """A connection that leads out of here stays, although its other end has the name."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        accepted, _ = listener.accept()
        with accepted:
            listener.close()
            assert not cut(f"ipv4:127.0.0.1:{port}")
            assert not is_cut(accepted)
            assert not is_cut(client)


@pytest.mark.parametrize("peer", ["", "unix:", "unix:/run/a", "ipv4:127.0.0.1:1", "ipv4:127.0.0.1", "ipv6:[::1]:1"])
def test_what_cannot_be_found_is_not_cut(peer):
    """Nobody is connected from there, or the name is of no connection: False."""
    assert not cut(peer)


def test_one_that_is_cut_is_not_cut_again():
    """What is cut once, counts once, although its end is not closed yet."""
    with connection("127.0.0.1", "127.0.0.1") as (_, client):
        peer = f"ipv4:127.0.0.1:{client.getsockname()[1]}"
        assert cut(peer)
        assert not cut(peer)


def test_one_that_is_gone_is_not_cut():
    """A client that has closed its end before is no connection."""
    with connection("127.0.0.1", "127.0.0.1") as (accepted, client):
        port = client.getsockname()[1]
        accepted.shutdown(socket.SHUT_RDWR)
        client.close()
        assert not cut(f"ipv4:127.0.0.1:{port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_calls_of_a_connection_that_is_cut_end(host):
    """On grpc's own connections: the server's handler is cancelled, the client gets UNAVAILABLE."""
    peers, ended = asyncio.Queue(), asyncio.Event()

    async def wait(_, context):
        peers.put_nowait(context.peer())
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    server = grpc.aio.server()
    handlers = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
    port = server.add_insecure_port(f"{host}:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
        call = channel.unary_unary("/test/Wait")(b"")
        peer = await asyncio.wait_for(peers.get(), PATIENCE)
        assert peer_address(peer) is not None
        assert cut(peer)
        await asyncio.wait_for(ended.wait(), PATIENCE)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(None)
