"""The same tokens through gRPC: concurrent streams over the real engine give what transformers' `generate` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache

import pytest

from hsrpc.client import AsyncClient
from hsrpc.config import EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.request import FinishReason
from hsrpc.server import Server, ServerConfig
from hsrpc.v1.server_pb2 import BLOCK_KIND_ACTIVATION, BLOCK_KIND_KV, GetServerInfoResponse
from tests.engine.conftest import tightest
from tests.engine.reference import Reference, make_reference

MAX_TOKENS = 32
KINDS = {"kv": {BLOCK_KIND_KV}, "activation": {BLOCK_KIND_ACTIVATION}, "recompute": set()}
"""What each policy keeps; the hybrid keeps both."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """References by model name."""
    return cache(lambda name: make_reference(name, tmp_path_factory.mktemp(name)))


def config_for(reference: Reference, policy: str, share: float | None) -> EngineConfig:
    """Prompts longer than a prefill chunk, and budgets in which the requests preempt each other."""
    config = EngineConfig(
        model=str(reference.directory),
        device="cpu",
        cache_policy=policy,
        activation_share=share,
        min_batch=6,
        max_batch=6,
        max_model_len=128,
        max_prefill_tokens=24,
        expected_context=24,
    )
    return tightest(config)


async def stream_all(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], GetServerInfoResponse]:
    """The token ids of all prompts, streamed at once, and what the server says afterwards."""

    async def one(prompt: list[int]) -> list[int]:
        stream = client.generate(prompt, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, return_token_ids=True)
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish.reason is FinishReason.MAX_TOKENS
        return [token_id for delta in deltas for token_id in delta.token_ids]

    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    try:
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(*map(one, prompts)), await client.get_server_info()
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("policy", "share"), [("kv", None), ("activation", None), ("hybrid", 0.3), ("recompute", None)]
)
@pytest.mark.parametrize("model", ["opt", "llama"])
async def test_streamed_tokens_equal_the_reference(made, model, policy, share):
    """16 ragged prompts at once, weights and caches streaming, under every policy: each token is the reference's."""
    reference = made(model)
    async with Engine(config_for(reference, policy, share)) as engine:
        token_ids, info = await stream_all(engine, reference.prompts)
    assert token_ids == [output[:MAX_TOKENS] for output in reference.outputs]
    assert info.measured.weights_streamed_bytes > 0
    assert info.measured.generated_tokens == len(reference.prompts) * MAX_TOKENS
    kinds = {use.kind for use in info.load.blocks if use.peak}
    assert kinds == KINDS.get(policy, {BLOCK_KIND_KV, BLOCK_KIND_ACTIVATION})
    assert (info.measured.regenerated_tokens > 0) == (BLOCK_KIND_ACTIVATION in kinds)
    assert sum(use.used for use in info.load.blocks) == 0
