"""A real server on a free port of the loopback, over a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc.status_pb2 import Status

from hsrpc.server import Server, ServerConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2_grpc

if TYPE_CHECKING:
    from hsrpc.server.engine_protocol import Engine
    from hsrpc.v1.generation_pb2_grpc import GenerationServiceAsyncStub


ROOT = Path(__file__).parents[2]


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def loading_server() -> AsyncIterator[Server]:
    """Bound, without an engine."""
    server = Server(ServerConfig(port=0, drain_timeout=5, write_timeout=0.5))
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def server(loading_server: Server, engine: FakeEngine) -> Server:
    await loading_server.attach(engine)
    return loading_server


@pytest.fixture
async def channel(loading_server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(loading_server.address) as channel:
        yield channel


@pytest.fixture
def stub(server: Server, channel: grpc.aio.Channel) -> GenerationServiceAsyncStub:
    return generation_pb2_grpc.GenerationServiceStub(channel)


@asynccontextmanager
async def stub_of(engine: Engine) -> AsyncIterator[GenerationServiceAsyncStub]:
    """The generation service of a server that has `engine`."""
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)
    await server.stop()


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds; fail after two seconds."""
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("not within two seconds")


def rich_status(error: grpc.aio.AioRpcError) -> Status:
    """The google.rpc details of a call that failed."""
    [details] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    return Status.FromString(details)
