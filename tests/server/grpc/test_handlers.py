"""Calls whose client is gone before grpc says so: they are cancelled calls, and no fault of the server's."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2

from hsrpc.server import ServerConfig
from hsrpc.server.grpc.handlers import streaming, unary
from hsrpc.server.grpc.observation import RpcMethod
from hsrpc.server.grpc.sending import Sender
from hsrpc.server.observation import METHODS, CallCounter
from hsrpc.server.readers import Readers
from hsrpc.v1 import generation_pb2, model_pb2
from hsrpc.v1 import server_pb2 as v1

LACKING = {"Embed", "FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents"}
"""Methods of VllmEngine that do nothing here: they count as others."""
SENDER = Sender(ServerConfig(), Readers(lambda *_: None))


def test_methods_have_the_names_that_metrics_know():
    """All that the proto files declare: a method that is missing would be counted as other."""
    declared = [
        method.name
        for module in (generation_pb2, model_pb2, v1, vllm_engine_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.name not in LACKING
    ]
    assert tuple(dict.fromkeys(declared)) == METHODS


class DeadContext:
    """The context of a call whose connection has just gone: nothing can be sent any more."""

    def __init__(self, remaining: float | None) -> None:
        self._remaining = remaining

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float | None:
        return self._remaining

    async def write(self, _: object) -> None:
        raise grpc.aio.InternalError("failed batch")

    async def abort(self, *_: object) -> None:
        raise grpc.aio.InternalError("failed batch")


async def report(_: v1.WatchLoadRequest, write) -> None:
    await write(v1.WatchLoadResponse())


async def refuse(_: v1.GetServerInfoRequest) -> v1.GetServerInfoResponse:
    raise ValueError("secret")


@pytest.mark.parametrize(
    ("remaining", "status"),
    [(None, "CANCELLED"), (1.0, "CANCELLED"), (0.05, "DEADLINE_EXCEEDED"), (0.0, "DEADLINE_EXCEEDED")],
)
async def test_a_write_to_nobody_is_a_cancelled_call(remaining, status, caplog):
    """It is counted as cancelled, or as late, and the log has no error of it."""
    counted = []
    counter = CallCounter(lambda method, code: counted.append((method, code.name)))
    handler = streaming(v1.WatchLoadRequest, report, SENDER, [counter])(RpcMethod("Service", "WatchLoad"))
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await handler.unary_stream(b"", DeadContext(remaining))
    assert counted == [("WatchLoad", status)]
    assert not caplog.records


async def test_a_status_for_nobody_is_a_cancelled_call():
    """What the call came to is counted all the same."""
    counted = []
    counter = CallCounter(lambda method, code: counted.append((method, code.name)))
    handler = unary(v1.GetServerInfoRequest, refuse, SENDER, [counter])(RpcMethod("Service", "GetServerInfo"))
    with pytest.raises(asyncio.CancelledError):
        await handler.unary_unary(b"", DeadContext(None))
    assert counted == [("GetServerInfo", "INTERNAL")]
