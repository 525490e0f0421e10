"""Clients that are gone without a word, or do not read, over a real engine: work stops, and others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import torch

from hsrpc.engine.engine import Engine
from hsrpc.server import Server, ServerConfig
from hsrpc.server.security import SecurityConfig
from hsrpc.v1 import generation_pb2_grpc
from tests.engine.support import PATIENCE, idle, live, until
from tests.server.proxy import Proxy
from tests.server.test_leaving import Gate, message, token_ids
from tests.server.test_real_engine import CONFIG

ALONE = ("grpc.use_local_subchannel_pool", 1)
NARROW = [ALONE, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
"""A client that takes little before it reads."""


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    torch.set_num_threads(1)
    async with Engine(replace(CONFIG, min_batch=2, max_batch=2, max_model_len=512, gpu_memory="256MiB")) as engine:
        yield engine


@asynccontextmanager
async def serving(engine: Engine, write_timeout: float = 30.0, **security: float) -> AsyncIterator[Server]:
    server = Server(ServerConfig(port=0, write_timeout=write_timeout, security=SecurityConfig(**security)))
    await server.start()
    await server.attach(engine)
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def stub_of(
    address: str, options: list[tuple[str, int]] | None = None
) -> AsyncIterator[generation_pb2_grpc.GenerationServiceAsyncStub]:
    """A client with a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=options or [ALONE]) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@asynccontextmanager
async def held_amid_output(engine: Engine, stub, tokens: int) -> AsyncIterator[grpc.aio.UnaryStreamCall]:
    """A call that is held with `tokens` of its output made, if it has not ended before; after the block it must leave
    the engine, and the next step finds its blocks free."""
    gate = Gate(engine)
    gone = message([5, 6, 7], 480, request_id="gone")
    gone.output.max_tokens_per_message = 1
    gone.output.logprobs = 20
    call = stub.Generate(gone)
    await until(lambda: live(engine, "gone"))
    gate.request = live(engine, "gone")
    gate.close_when(lambda: gate.request.num_output_tokens >= tokens)
    await until(lambda: gate.closed.is_set() or live(engine, "gone") is None)
    yield call
    await until(lambda: live(engine, "gone") is None)
    gate.open()
    steps = 1 if gate.closed.is_set() else 2  # where no step was held, one may be on its way to the executor
    await until(lambda: len(gate.blocks) >= steps or 0 in gate.blocks)
    assert 0 in gate.blocks[:steps]


@pytest.mark.parametrize("way", ["silent", "reset"])
async def test_a_client_behind_a_dead_network_is_left(way: str, engine: Engine):
    """Packets dropped without a close are noticed within keepalive time and timeout, a reset at once: the stream's work
    stops, its blocks are free with the step at hand, and a neighbour gets the tokens that it gets alone."""
    keepalive = {"keepalive_time": 0.5, "keepalive_timeout": 2.0} if way == "silent" else {}
    async with asyncio.timeout(2 * PATIENCE), serving(engine, **keepalive) as server, stub_of(server.address) as near:
        expected = await token_ids(near.Generate(message([9, 8, 7], 60)))
        async with Proxy(server.port) as proxy, stub_of(proxy.address) as far:
            neighbour = asyncio.create_task(token_ids(near.Generate(message([9, 8, 7], 60))))
            await until(lambda: engine.stats().running)
            async with held_amid_output(engine, far, 3) as call:
                assert (await call.read()).HasField("start")
                proxy.fall_silent() if way == "silent" else proxy.reset()
            assert await neighbour == expected
            await idle(engine)
            call.cancel()


async def test_a_slow_reader_ends_alone(engine: Engine):
    """A stream that is left unread for write_timeout is reset, its blocks are free with the step at hand, and a
    neighbour on the same server gets every token."""
    async with (
        asyncio.timeout(2 * PATIENCE),
        serving(engine, write_timeout=0.3) as server,
        stub_of(server.address) as near,
        stub_of(server.address, NARROW) as slow,
    ):
        expected = await token_ids(near.Generate(message([9, 8, 7], 60)))
        async with held_amid_output(engine, slow, 400) as call:
            neighbour = asyncio.create_task(token_ids(near.Generate(message([9, 8, 7], 60))))
        assert await neighbour == expected
        await idle(engine)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await token_ids(call)
        assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
