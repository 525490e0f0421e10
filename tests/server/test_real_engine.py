"""The service over the real engine and the bundled model: what a client gets is what an embedded engine gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from hsrpc.client import AsyncClient, CallError
from hsrpc.config import EngineConfig
from hsrpc.core.request import Delta, FinishReason, SamplingParams
from hsrpc.engine.engine import Engine
from hsrpc.server import Server, ServerConfig
from tests.server.conftest import until

PROMPTS = [f"Once upon a time there were {number} kings" for number in range(16)]


@pytest.fixture
async def real_engine() -> AsyncIterator[Engine]:
    torch.set_num_threads(1)
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        gpu_memory="64MiB",
        host_memory="64MiB",
        max_model_len=256,
        max_batch=8,
        max_queued_requests=16,
        cache_policy="hybrid",
        activation_share=0.5,
    )
    async with Engine(config) as engine:
        yield engine


@pytest.fixture
async def client(real_engine: Engine) -> AsyncIterator[AsyncClient]:
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(real_engine)
    async with AsyncClient(server.address) as client:
        yield client
    await server.stop()


async def text_of(deltas: AsyncIterator[Delta]) -> str:
    return "".join([delta.text async for delta in deltas])


async def test_many_streams_give_what_the_engine_gives(client, real_engine):
    """Concurrent streams each get their own text, that of the embedded engine, and leave no block behind."""
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = [await text_of(real_engine.generate(prompt, params)) for prompt in PROMPTS]
    completions = await asyncio.gather(*(client.complete(prompt, temperature=0, max_tokens=12) for prompt in PROMPTS))
    assert [completion.text for completion in completions] == expected
    assert {completion.finish.reason for completion in completions} <= {FinishReason.MAX_TOKENS, FinishReason.EOS}
    await until(lambda: not any(real_engine.stats().used_blocks.values()))


async def test_a_seed_repeats_the_output(client):
    """The seed that start names gives the same tokens again."""
    first = await client.complete(PROMPTS[0], max_tokens=12, return_token_ids=True)
    again = await client.complete(PROMPTS[0], max_tokens=12, return_token_ids=True, seed=first.start.sampling.seed)
    assert first.token_ids == again.token_ids


async def test_leaving_frees_the_blocks(client, real_engine):
    """A cancelled stream and a passed deadline leave nothing running and no block used."""
    async with client.generate(PROMPTS[0], ignore_eos=True) as stream:
        await anext(stream)
        assert real_engine.stats().running == 1
    with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
        await client.complete(PROMPTS[0], ignore_eos=True, timeout=0.05)
    await until(lambda: real_engine.stats().running == 0)
    await until(lambda: not any(real_engine.stats().used_blocks.values()))


async def test_a_full_queue_refuses_and_recovers(client, real_engine):
    """More requests than may wait: some are refused with RESOURCE_EXHAUSTED, all others finish."""
    results = await asyncio.gather(
        *(client.complete(PROMPTS[0], max_tokens=8, ignore_eos=True) for _ in range(64)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, CallError)]
    assert refused
    assert {error.code.name for error in refused} == {"RESOURCE_EXHAUSTED"}
    assert all(error.retry_after for error in refused)
    assert len(refused) <= 64 - 16
    assert (await client.complete(PROMPTS[0], max_tokens=2)).text
