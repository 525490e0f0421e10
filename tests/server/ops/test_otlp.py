"""Spans end to end: from a call through the exporter to a collector on the loopback that speaks OTLP over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from hsrpc.server import ServerConfig, serve
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.grpc.test_lifecycle import SERVING, served
from tests.server.ops.test_metrics import scrape
from tests.server.test_real_engine import printed_address

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)


class Collector(HTTPServer):
    """Takes what exporters post, in a thread."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Intake)
        self.paths: set[str] = set()
        self.service_names: set[str] = set()
        self.spans: dict[str, Span] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def take(self, path: str, request: ExportTraceServiceRequest) -> None:
        self.paths.add(path)
        for group in request.resource_spans:
            self.service_names.add(attributes(group.resource)["service.name"])
            self.spans |= {span.name: span for scope in group.scope_spans for span in scope.spans}


class Intake(BaseHTTPRequestHandler):
    """One export."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        data = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        self.server.take(self.path, ExportTraceServiceRequest.FromString(data))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.fixture
def dead_endpoint() -> Iterator[str]:
    """Connections are taken, and nothing is read from them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"


def value_of(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes(holder: Span) -> dict[str, object]:
    return {attribute.key: value_of(attribute.value) for attribute in holder.attributes}


async def serve_two_calls(config: ServerConfig, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, ...], float]:
    """A call that goes well, and one that does not; then the server is told to end. The metrics at that moment."""
    telemetry = Telemetry(config)
    serving = asyncio.create_task(serve(FakeEngine(), config, telemetry=telemetry))
    async with grpc.aio.insecure_channel(await printed_address(capsys)) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        good = stub.Generate(v1.GenerateRequest(text="secret", request_id="r"), metadata=CALLER, wait_for_ready=True)
        assert [_ async for _ in good]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(v1.GenerateRequest()).read()
        values = await scrape(telemetry)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 20)
    return values


async def test_spans_and_counts_leave_a_serving_process(collector, capsys):
    """By the end of serve the collector has a span for each call: the caller's child with gen_ai attributes and without
    text, and one with an error. The same calls are in the metrics."""
    config = ServerConfig(port=0, metrics_port=0, otel_endpoint=collector.endpoint)
    values = await serve_two_calls(config, capsys)
    assert values["hsrpc_calls_total", "Generate", "OK"] == 1
    assert (collector.paths, collector.service_names) == ({"/v1/traces"}, {"hsrpc"})
    good, bad = collector.spans["text_completion fake/model"], collector.spans["text_completion"]
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert good.kind == Span.SPAN_KIND_SERVER
    told = attributes(good)
    expected = {"gen_ai.operation.name": "text_completion", "gen_ai.request.model": "fake/model"}
    expected |= {"gen_ai.response.id": "r", "gen_ai.response.finish_reasons": ["eos"]}
    expected |= {"gen_ai.usage.input_tokens": 6, "gen_ai.usage.output_tokens": 4, "rpc.grpc.status_code": 0}
    assert expected.items() <= told.items()
    assert told["gen_ai.server.time_to_first_token"] > 0
    assert not bad.parent_span_id
    assert (bad.status.code, attributes(bad)["error.type"]) == (Status.STATUS_CODE_ERROR, "INVALID_ARGUMENT")
    assert not any(b"secret" in span.SerializeToString() for span in collector.spans.values())


async def test_a_dead_collector_keeps_no_process(dead_endpoint):
    """The last spans have what is left of the time to shut down, a second here; then the process ends with 0."""
    async with served("traced", dead_endpoint) as server:
        await server.become(SERVING)
        call = server.generate()
        stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
        while not (await stub.Abort(v1.AbortRequest(request_id="r"))).aborted:
            pass  # the other call is on its way
        assert await call.read()
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        assert await server.exit_code() == 0
        assert time.monotonic() - signalled > 0.9  # it did wait for the collector
        assert b"spans are left unsent" in await server.process.stderr.read()
