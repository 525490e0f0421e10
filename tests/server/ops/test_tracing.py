"""OpenTelemetry: a span a call, in the caller's trace."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hsrpc.errors import ConfigError
from hsrpc.server import Server, ServerConfig
from hsrpc.server.ops.tracing import Tracing, open_tracing
from hsrpc.v1 import generation_pb2 as v1
from tests.server.conftest import until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def loading_server(spans: InMemorySpanExporter) -> AsyncIterator[Server]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    server = Server(ServerConfig(port=0), observers=[Tracing(provider)])
    await server.start()
    yield server
    await server.stop()


async def test_a_span_has_the_callers_parent_and_what_came_of_it(stub, spans):
    """traceparent is honoured; usage, model, id and reason are gen_ai attributes."""
    metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
    assert [_ async for _ in stub.Generate(v1.GenerateRequest(text="Hi", request_id="r"), metadata=metadata)]
    await until(spans.get_finished_spans)
    [span] = spans.get_finished_spans()
    assert (format(span.context.trace_id, "032x"), format(span.parent.span_id, "016x")) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("text_completion fake/model", SpanKind.SERVER)
    told = {"gen_ai.request.model": "fake/model", "gen_ai.response.id": "r", "rpc.grpc.status_code": 0}
    told |= {"gen_ai.usage.input_tokens": 2, "gen_ai.usage.output_tokens": 4}
    assert told.items() <= dict(span.attributes).items()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("eos",)
    assert span.status.status_code is StatusCode.UNSET


async def test_a_failed_call_is_an_error(stub, spans):
    """The status is on the span, and without a traceparent it begins a trace."""
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(v1.GenerateRequest(), metadata=[("traceparent", "nonsense")]).read()
    await until(spans.get_finished_spans)
    [span] = spans.get_finished_spans()
    assert span.parent is None
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "INVALID_ARGUMENT"


def test_tracing_is_off_unless_asked_for(monkeypatch):
    """Neither flag nor variable: no spans, and no package is loaded for them."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert open_tracing(None) is None


def test_a_missing_package_is_named(monkeypatch):
    """With the flag it is an error that says what to install; with the variable alone the server goes on without."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"^otel_endpoint=.*pip install 'hsrpc\[otel\]'"):
        open_tracing("http://127.0.0.1:1/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert open_tracing(None) is None
