"""Calls of gRPC as observers are told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hsrpc.server.failure import Outcome
from hsrpc.server.grpc.caller import proven_client
from hsrpc.server.grpc.status import status_code
from hsrpc.server.observation import Arrival, CallObserver, ObservedCall, observed

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_TRACE_KEYS = ("traceparent", "tracestate")


class RpcMethod(NamedTuple):
    """A method of a service."""

    service: str
    """With its package: hsrpc.v1.GenerationService."""
    name: str


def observed_call(
    observers: Sequence[CallObserver], method: RpcMethod, context: Context
) -> AbstractContextManager[ObservedCall | None]:
    """The call in the block is told to the observers; None where there are none."""
    return observed(_arrival(method, context), observers) if observers else nullcontext()


def _arrival(method: RpcMethod, context: Context) -> Arrival:
    metadata = context.invocation_metadata() or ()
    trace = {key: value for key, value in metadata if key in _TRACE_KEYS and isinstance(value, str)}
    protocol = partial(_span_attributes, method)
    return Arrival(method.name, proven_client(context), context.time_remaining, trace, protocol)


def _span_attributes(method: RpcMethod, outcome: Outcome) -> Mapping[str, str | int]:
    """By OpenTelemetry's semantic conventions for RPC."""
    return {
        "rpc.system": "grpc",
        "rpc.service": method.service,
        "rpc.method": method.name,
        "rpc.grpc.status_code": status_code(outcome).value[0],
    }
