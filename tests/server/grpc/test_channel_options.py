"""Limits of connections, seen from raw sockets and from clients that overdo it."""

from __future__ import annotations

import asyncio
import struct

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hsrpc.client import AsyncClient
from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc.channel_options import channel_options, connection_options
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.testing.raw_http2 import ENHANCE_YOUR_CALM, GOAWAY, MAX_CONCURRENT_STREAMS, PING, connected, frame
from hsrpc.v1 import model_pb2, model_pb2_grpc
from tests.server.secured import Authority, plain, serving


@pytest.mark.parametrize("tls", [False, True])
async def test_a_connection_that_says_nothing_is_closed(tmp_path, tls):
    """Whoever does not finish the handshake in time loses the connection."""
    files = Authority(tmp_path).issue() if tls else {}
    async with serving(handshake_timeout=0.2, **files) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()


async def test_too_many_pings_end_the_connection():
    """Pings without calls, faster than allowed, are answered with ENHANCE_YOUR_CALM."""
    async with serving() as server, connected(server.port) as client:
        client.write(frame(PING, bytes(8)) * 8)
        await client.until_cut()
        [*_, last] = [each.payload for each in client.frames if each.kind == GOAWAY]
        assert struct.unpack(">II", last[:8])[1] == ENHANCE_YOUR_CALM


async def test_metadata_is_bounded():
    """A call with more metadata than allowed is RESOURCE_EXHAUSTED; one with less is answered."""
    async with serving() as server, plain(server) as channel:
        call = model_pb2_grpc.ModelServiceStub(channel).GetModel
        assert (await call(model_pb2.GetModelRequest(), metadata=[("x-filler", "x" * 10_000)])).name == "fake/model"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(model_pb2.GetModelRequest(), metadata=[("x-filler", "x" * 20_000)])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_concurrent_streams_are_advertised():
    """The server's settings tell clients how many calls a connection takes."""
    async with serving() as server, connected(server.port) as client:
        settings = dict(struct.iter_unpack(">HI", client.frames[0].payload))
        assert settings[MAX_CONCURRENT_STREAMS] == server.config.max_streams_per_connection


async def test_an_old_connection_is_replaced_and_its_streams_go_on(engine):
    """Past the age new calls take a new connection; a stream that runs has all the time it needs."""
    engine.held = True
    peers = set()

    class Peers(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation, handler_call_details):
            handler = await continuation(handler_call_details)

            async def get_model(request, context):
                peers.add(context.peer())
                return await handler.unary_unary(request, context)

            if handler_call_details.method.endswith("/GetModel"):
                return grpc.unary_unary_rpc_method_handler(
                    get_model, handler.request_deserializer, handler.response_serializer
                )
            return handler

    server = Server(ServerConfig(port=0, security=SecurityConfig(max_connection_age=0.3)), [Peers()])
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address) as client:
        stream = client.generate("Hi", request_id="long")
        await client.get_model()
        first = set(peers)
        for _ in range(100):
            await client.get_model()
            if peers != first:
                break
            await asyncio.sleep(0.05)
        assert len(peers) > 1
        await asyncio.sleep(0.5)
        engine.say("long", "still", " here")
        engine.end("long")
        assert "".join([delta.text async for delta in stream]) == "still here"
    await server.stop()


def test_the_arguments_are_those_of_the_documentation():
    """Keepalive 30 s / 10 s, a grace without end, and sizes as configured."""
    found = dict(channel_options(ServerConfig()))
    assert (found["grpc.keepalive_time_ms"], found["grpc.keepalive_timeout_ms"]) == (30_000, 10_000)
    assert found["grpc.http2.ping_timeout_ms"] == 10_000
    assert found["grpc.max_connection_age_ms"] == 1_800_000
    assert (found["grpc.http2.max_ping_strikes"], found["grpc.http2.min_ping_interval_without_data_ms"]) == (2, 10_000)
    assert found["grpc.max_connection_age_grace_ms"] == 2**31 - 1
    assert found["grpc.server_handshake_timeout_ms"] == 10_000
    assert (found["grpc.http2.lookahead_bytes"], found["grpc.http2.bdp_probe"]) == (16_384, 0)
    assert found["grpc.max_metadata_size"] == found["grpc.absolute_max_metadata_size"] == 16_384
    never = ServerConfig(security=SecurityConfig(max_connection_age=0))
    assert dict(channel_options(never))["grpc.max_connection_age_ms"] == 2**31 - 1


async def test_both_listeners_have_the_limits(monkeypatch):
    """Each argument reaches the listener of the services; those of every connection reach that of the probes too."""
    made, make = [], grpc.aio.server

    def server(*, options, **settings):
        made.append(options)
        return make(options=options, **settings)

    monkeypatch.setattr(grpc.aio, "server", server)
    config = ServerConfig(port=0, security=SecurityConfig(health_port=0))
    Server(config)
    services, probes = map(set, made)
    assert services == set(channel_options(config))
    assert probes >= set(connection_options(config.security))
    assert {("grpc.max_receive_message_length", 4096), ("grpc.max_concurrent_streams", 64)} <= probes


async def test_round_robin_reaches_every_address():
    """The calls of one client go to all servers of its target."""
    engines = [FakeEngine(), FakeEngine()]
    async with serving(engines[0]) as one, serving(engines[1]) as two:
        target = f"ipv4:{one.address},{two.address}"
        async with AsyncClient(target) as client:
            for _ in range(200):
                await client.complete("Hi")
                if all(engine.submitted for engine in engines):
                    break
    assert all(engine.submitted for engine in engines)


async def test_health_on_a_port_of_its_own(tmp_path):
    """Probes in plain text learn there what TLS keeps from them; nothing else is served, and it follows the server."""
    authority = Authority(tmp_path)
    files = authority.issue()
    async with (
        serving(health_port=0, tls_client_ca=authority.roots, **files) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.health_port.port}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        other = channel.unary_unary("/hsrpc.v1.ModelService/GetModel")(b"")
        assert await other.code() is grpc.StatusCode.UNIMPLEMENTED
        await server.fail()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_without_a_health_port_none_is_open():
    """By default there is one listener."""
    async with serving() as server:
        assert server.grpc.health_port.port is None


async def test_the_health_port_closes_with_the_server():
    """After stop nobody answers there."""
    async with serving(health_port=0) as server:
        port = server.grpc.health_port.port
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_reflection_can_be_off():
    """Without reflection nobody is told the proto files; with it, which is the default, everybody who may call."""
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with serving(reflection=False) as server, plain(server) as channel:
        assert await channel.stream_stream(method)(timeout=5).code() is grpc.StatusCode.UNIMPLEMENTED
