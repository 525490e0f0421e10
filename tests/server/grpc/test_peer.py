"""One client has one name, wherever it is named."""

from __future__ import annotations

import logging

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc.peer import peer_host
from hsrpc.server.ops.logs import RequestLog
from hsrpc.server.ops.tracing import Tracing
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import until


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:40500", "10.0.0.7"),
        ("ipv6:%5B::1%5D:40500", "::1"),
        ("ipv6:[::1]:40500", "::1"),
        ("ipv6:[2001:DB8:0:0:0:0:0:1]:5", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", "fe80::1%eth0"),
        ("ipv6:[fe80::1%eth0]:5", "fe80::1%eth0"),
        ("ipv6:[fe80::1%eb0]:5", "fe80::1%eb0"),
        ("ipv6:[::ffff:10.0.0.7]:5", "10.0.0.7"),
        ("unix:", "unix:"),
        ("unix:/run/hsrpc.sock", "unix:/run/hsrpc.sock"),
        ("unix-abstract:hsrpc", "unix-abstract:hsrpc"),
        ("vsock:3:5", "vsock:3:5"),
        ("", "unknown"),
    ],
)
def test_a_client_is_its_host(peer, host):
    """One form, without the port, which changes with every connection."""
    assert peer_host(peer) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_share_log_and_span_name_one_client_alike(host, engine, caplog):
    """The key of its fair share, the client in the log, and the address in the span are the same."""
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    server = Server(ServerConfig(host=host, port=0), observers=[RequestLog(), Tracing(provider)])
    await server.start()
    await server.attach(engine)
    with caplog.at_level(logging.INFO, "hsrpc.request"):
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert [_ async for _ in stub.Generate(v1.GenerateRequest(text="Hi"))]
        await until(spans.get_finished_spans)
    await server.stop()
    [line] = [record.request["client"] for record in caplog.records if record.name == "hsrpc.request"]
    [span] = spans.get_finished_spans()
    assert [*engine.clients, line, span.attributes["client.address"]] == [host] * 3
