"""Requests that do not come, or come in part, or twice: calls end in time, with a status that says why."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from hsrpc.server import Server, ServerConfig
from hsrpc.server.failure import Outcome
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.raw_http2 import DATA, END_STREAM, connected, frame, message, reset
from hsrpc.v1 import model_pb2, model_pb2_grpc
from tests.server.conftest import until
from tests.server.secured import plain

GET_MODEL, GENERATE = "/hsrpc.v1.ModelService/GetModel", "/hsrpc.v1.GenerationService/Generate"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HALF = message(b"half of it")[:-5]


class Counts(Counter[tuple[str, Outcome]]):
    def count(self, method: str, outcome: Outcome) -> None:
        self[method, outcome] += 1


@asynccontextmanager
async def served(engine, counts: Counts, request_timeout: float) -> AsyncIterator[Server]:
    config = ServerConfig(port=0, request_timeout=request_timeout, security=SecurityConfig(health_port=0))
    server = Server(config, count_call=counts.count)
    await server.start()
    await server.attach(engine)
    try:
        yield server
    finally:
        await server.stop()


@pytest.mark.parametrize("data", [b"", HALF], ids=["none", "half"])
async def test_a_request_that_does_not_come_ends_its_call(engine, data):
    """Every service, on both ports: DEADLINE_EXCEEDED, counted; nothing is left, and others are answered."""
    counts = Counts()
    async with served(engine, counts, 0.2) as server, plain(server) as channel:
        await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())
        tasks = len(asyncio.all_tasks())
        for port, methods in (
            (server.port, (GET_MODEL, GENERATE, CHECK, WATCH, REFLECTION)),
            (server.grpc.health_port.port, (CHECK, WATCH)),
        ):
            async with connected(port) as client:
                streams = [client.call(method, data) for method in methods]
                for stream in streams:
                    assert b"did not come whole within 0.2 s" in await client.end_of(stream)
                for method in methods:
                    assert counts.pop((method.rpartition("/")[2], Outcome.DEADLINE_EXCEEDED)) == 1
        await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())
        assert counts == {("GetModel", Outcome.OK): 2}
        await until(lambda: len(asyncio.all_tasks()) <= tasks)


async def test_a_call_that_is_reset_before_its_request_came_is_counted(engine):
    """CANCELLED, once."""
    counts = Counts()
    async with served(engine, counts, 30) as server, connected(server.port) as client:
        stream = client.call(GENERATE, HALF)
        await asyncio.sleep(0.1)  # else gRPC may drop it unseen
        client.write(reset(stream))
        await until(lambda: counts)
        assert counts == {("Generate", Outcome.CANCELLED): 1}


async def test_a_request_may_come_in_parts(engine):
    """Within the time the parts make one message."""
    async with served(engine, Counts(), 30) as server, connected(server.port) as client:
        data = message(health_pb2.HealthCheckRequest(service="hsrpc.v1.GenerationService").SerializeToString())
        stream = client.call(CHECK, data[:9])
        client.write(frame(DATA, data[9:], stream, END_STREAM))
        await client.end_of(stream)
        assert client.body(stream) == message(health_pb2.HealthCheckResponse(status="SERVING").SerializeToString())


@pytest.mark.parametrize(("requests", "found"), [([], "none"), ([b"", b""], "more")])
@pytest.mark.parametrize("method", [GET_MODEL, GENERATE, CHECK])
async def test_a_call_takes_exactly_one_request(engine, method, requests, found):
    """UNIMPLEMENTED, which gRPC's list of statuses has for it, and counted."""
    async with served(engine, counts := Counts(), 30) as server, plain(server) as channel:
        call = channel.stream_stream(method)(iter(requests), timeout=5)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        end = "came; send one, and then end the stream"
        assert await call.details() == f"this method takes one message, and {found} {end}"
        assert counts == {(method.rpartition("/")[2], Outcome.UNIMPLEMENTED): 1}


@pytest.mark.parametrize("method", [CHECK, REFLECTION])
async def test_what_is_no_message_is_refused_by_every_service(engine, method):
    """INVALID_ARGUMENT, without a word of Python."""
    async with served(engine, Counts(), 30) as server, plain(server) as channel:
        call = channel.stream_stream(method)(iter([b"\xff"]))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "the request is not a protobuf message of this method's type"


async def test_a_method_that_is_not_there(engine):
    """UNIMPLEMENTED with a remedy, counted among others."""
    async with served(engine, counts := Counts(), 30) as server, plain(server) as channel:
        call = channel.unary_unary("/hsrpc.v1.ModelService/GetModels")(b"")
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await call.details() == "no such method here; compare its name and the server's version"
        assert counts == {("GetModels", Outcome.UNIMPLEMENTED): 1}


async def test_a_stream_of_requests_is_answered_one_by_one(engine):
    """Reflection takes many: each has the time anew."""
    async with served(engine, Counts(), 0.5) as server, plain(server) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        call = channel.stream_stream(REFLECTION)()
        for _ in range(3):
            await call.write(request)
            answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
            assert "hsrpc.v1.ModelService" in [each.name for each in answer.list_services_response.service]
            await asyncio.sleep(0.2)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
