"""OpenTelemetry: one span for each Generate call. Off without the packages of `hsrpc[otel]` or without an endpoint."""

from __future__ import annotations

import logging
import os
from threading import Thread
from typing import TYPE_CHECKING

from hsrpc.errors import ConfigError
from hsrpc.server.failure import Outcome
from hsrpc.server.observation import ObservedCall

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_log = logging.getLogger(__name__)


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Spans to `endpoint`, else to where the OTEL_* variables say; None where nothing asks for them.

    Raises:
        ConfigError: an endpoint is given and the packages are missing.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        if endpoint is None:
            return None
        problem = f"{error.name} is not installed"
        raise ConfigError("otel_endpoint", endpoint, problem, "pip install 'hsrpc[otel]', or leave it out") from None
    name = os.environ.get("OTEL_SERVICE_NAME", "hsrpc")
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


class Tracing:
    """An observer of calls that makes their spans; children of the caller's span where `traceparent` names one."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("hsrpc")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._spans: dict[ObservedCall, Span] = {}

    def started(self, call: ObservedCall) -> None:
        parent = self._propagator.extract(call.arrival.trace)
        self._spans[call] = self._tracer.start_span("text_completion", parent, self._kind)

    def ended(self, call: ObservedCall) -> None:
        from opentelemetry.trace import StatusCode

        span = self._spans.pop(call)
        span.set_attributes(_attributes(call))
        if call.model:
            span.update_name(f"text_completion {call.model}")
        if call.outcome is not Outcome.OK:
            span.set_attribute("error.type", call.outcome.value)
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self, seconds: float) -> None:
        """Send what is left, for at most that time; a collector that does not answer costs the spans."""
        sending = Thread(target=self._provider.shutdown, name="spans", daemon=True)  # ends with the process
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            _log.warning("spans are left unsent: the collector did not take them within %.1f s", seconds)


def _attributes(call: ObservedCall) -> dict[str, str | int | float | list[str]]:
    """By the semantic conventions for generative AI, and those of the call's protocol."""
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "hsrpc",
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.output_tokens": call.completion_tokens,
        "client.address": call.arrival.client,
        **call.arrival.protocol(call.outcome),
    }
    if call.model:
        attributes |= {"gen_ai.request.model": call.model, "gen_ai.response.model": call.model}
        attributes["gen_ai.response.id"] = call.request_id
    if call.first_token_seconds is not None:
        attributes["gen_ai.server.time_to_first_token"] = call.first_token_seconds
    if call.finish is not None:
        attributes["gen_ai.response.finish_reasons"] = [call.finish.reason.value.lower()]
        attributes["hsrpc.queue_seconds"] = call.finish.timings.queue
        attributes["hsrpc.preemptions"] = call.finish.usage.preemptions
    return attributes
