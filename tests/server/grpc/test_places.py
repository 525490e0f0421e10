"""Messages that come in part: what they hold is bounded, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest

from hsrpc.server.grpc import places
from hsrpc.server.grpc.places import MAX_READ_OF_CONNECTION
from hsrpc.v1 import model_pb2, model_pb2_grpc
from tests.server.grpc.half_messages import HalfMessages
from tests.server.grpc.raw_http2 import DATA, END_STREAM, connected, frame, message
from tests.server.secured import plain, serving

GET_MODEL, GENERATE = "/hsrpc.v1.ModelService/GetModel", "/hsrpc.v1.GenerationService/Generate"
CHECK, REFLECTION = "/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
MIB = 2**20
CALLS = 40


@pytest.mark.parametrize("method", [GENERATE, CHECK, REFLECTION])
async def test_half_messages_of_a_connection_are_bounded(engine, method):
    """A few of its calls are let send their message, the others 16 KiB; another's prompt of 4 MiB is read."""
    async with serving(engine) as server, connected(server.port) as client:
        halves = HalfMessages(client, 4 * MIB - 64, 3 * MIB)
        halves.begin(method, CALLS)
        assert 3 * MIB <= await halves.push() <= MAX_READ_OF_CONNECTION * 3 * MIB + CALLS * 2**14
        async with plain(server) as channel:
            call = model_pb2_grpc.ModelServiceStub(channel).Tokenize(
                model_pb2.TokenizeRequest(text="x" * (4 * MIB - 64))
            )
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "can fit the context" in await call.details()


async def test_half_messages_of_all_connections_are_bounded(engine, monkeypatch):
    """Where all places are taken for long, the oldest gives its to another connection."""
    monkeypatch.setattr(places, "MAX_READ", 2 * MAX_READ_OF_CONNECTION)
    monkeypatch.setattr(places, "PATIENCE", 0.2)
    async with serving(engine) as server, AsyncExitStack() as stack:
        halves = [
            HalfMessages(await stack.enter_async_context(connected(server.port)), MIB, MIB // 2) for _ in range(4)
        ]
        for each in halves:
            each.begin(GENERATE, MAX_READ_OF_CONNECTION)
        await asyncio.gather(*(each.push() for each in halves))
        channel = await stack.enter_async_context(plain(server))
        await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), timeout=5)


async def test_a_half_message_gives_way_to_another_of_its_connection(engine, monkeypatch):
    """The oldest ends with a status that says so; the one that came after it is answered."""
    monkeypatch.setattr(places, "PATIENCE_OF_CONNECTION", 0.2)
    async with serving(engine) as server, connected(server.port) as client:
        halves = [client.call(GENERATE, message(b"half of it")[:-5]) for _ in range(MAX_READ_OF_CONNECTION)]
        last = client.call(GET_MODEL, message(b""))
        client.write(frame(DATA, b"", last, END_STREAM))
        assert b"or sooner where others waited for their turn" in await client.end_of(halves[0])
        await client.end_of(last)
        assert [each for each in client.frames if (each.kind, each.stream) == (DATA, last)]
