"""Messages that come in part: what they hold is bounded, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest

from hsrpc.server.errors import CrowdedError
from hsrpc.server.grpc import reading_places
from hsrpc.server.grpc.reading_places import MAX_READ_OF_CONNECTION, ReadingPlaces
from hsrpc.testing.raw_http2 import DATA, END_STREAM, connected, frame, message
from hsrpc.v1 import model_pb2, model_pb2_grpc
from tests.server.grpc.half_messages import HalfMessages
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
    monkeypatch.setattr(reading_places, "MAX_READ", 2 * MAX_READ_OF_CONNECTION)
    monkeypatch.setattr(reading_places, "PATIENCE", 0.2)
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
    monkeypatch.setattr(reading_places, "PATIENCE_OF_CONNECTION", 0.2)
    async with serving(engine) as server, connected(server.port) as client:
        halves = [client.call(GENERATE, message(b"half of it")[:-5]) for _ in range(MAX_READ_OF_CONNECTION)]
        last = client.call(GET_MODEL, message(b""))
        client.write(frame(DATA, b"", last, END_STREAM))
        assert b"or sooner where others waited for their turn" in await client.end_of(halves[0])
        await client.end_of(last)
        assert [each for each in client.frames if (each.kind, each.stream) == (DATA, last)]


async def test_a_half_message_of_a_stranger_is_refused_unread(engine, tmp_path):
    """The token is looked at first: no more is taken than what is read ahead."""
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("alice 0123456789abcdef\n")
    async with serving(engine, auth_tokens=tokens) as server, connected(server.port) as client:
        halves = HalfMessages(client, 4 * MIB - 64, 3 * MIB)
        halves.begin(GENERATE, CALLS)
        assert await halves.push() <= CALLS * 2**16
        assert b"no token" in await client.end_of(client.call(REFLECTION, message(b"half of it")[:-5]))


async def test_those_that_wait_are_bounded(monkeypatch):
    """One connection may have half of them; the more have many, the fewer each may have, and one without always may."""
    monkeypatch.setattr(reading_places, "MAX_WAITING", 60)
    rooms = ReadingPlaces()

    def begin(connection: str, requests: int) -> list[asyncio.Task[None]]:
        async def wait() -> None:
            async with rooms.place(connection, bool):
                await asyncio.Event().wait()

        return [asyncio.create_task(wait()) for _ in range(requests)]

    tasks = {name: begin(name, 100) for name in "abc"}
    await asyncio.sleep(0)
    left = {name: [task for task in found if not task.done()] for name, found in tasks.items()}
    assert [len(found) for found in left.values()] == [31, 15, 8]
    for task in left["a"]:
        task.cancel()
    await asyncio.gather(*(task for found in tasks.values() for task in found if task.done()), return_exceptions=True)
    assert not begin("d", 1)[0].done()
    every = [task for found in tasks.values() for task in found]
    assert sum(isinstance(task.exception(), CrowdedError) for task in every if task.done() and not task.cancelled())
    for task in every:
        task.cancel()
    await asyncio.gather(*every, return_exceptions=True)
