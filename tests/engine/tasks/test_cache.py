"""The cache manager: what is stored comes back bit for bit, and loads are never further ahead than the buffers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from hsrpc.engine.bus import BusOrder

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine.tasks.cache import CacheManager, Stores
from hsrpc.model.formats.choice import uniform
from hsrpc.model.formats.plain import Plain
from hsrpc.model.spec import load_spec
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.packing import pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, Step
from hsrpc.schedule.sweep import BUFFERS
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import until

BLOCK_SIZE = 4
NUM_BLOCKS = 24
Rows = list[torch.Tensor]


@pytest.fixture(scope="module")
def sizes(reference: Callable[[str], Reference]) -> ModelSizes:
    return load_spec(reference("opt").directory, torch.float32).sizes


@asynccontextmanager
async def managing(sizes: ModelSizes, dtype: torch.dtype = torch.float32) -> AsyncIterator[CacheManager]:
    """A running manager with 24 blocks in each pool."""
    config = EngineConfig(device="cpu", max_batch=2, max_model_len=64, max_prefill_tokens=64, block_size=BLOCK_SIZE)
    plan = Planner(sizes, Budgets(device=2**30, host=2**30), HARDWARE, config).plan()
    buffers = replace(plan.buffers, activation_rows=plan.buffers.rows)
    plan = replace(plan, num_blocks=dict.fromkeys(PoolId, NUM_BLOCKS), buffers=buffers)
    cache = CacheManager(sizes, plan, CpuDevice(), uniform(Plain(dtype), dtype), BusOrder())
    task = asyncio.create_task(cache.run())
    try:
        yield cache
    finally:
        task.cancel()
        await asyncio.wait([task])


def make_request(blocks: Sequence[tuple[PoolId, int]], num_tokens: int) -> Request:
    """A request of `num_tokens` tokens in these blocks."""
    request = Request("a", [5] * num_tokens, SamplingParams(), 0, 0.0)
    for pool, index in blocks:
        request.blocks.append(pool, index)
    return request


def make_step(request: Request, context: int, count: int) -> Step:
    chunks = (Chunk(request, context, count, samples=True),)
    return Step(1, (chunks,), lambda: (pack(chunks, BLOCK_SIZE, None),))


def store_all(cache: CacheManager, sizes: ModelSizes, step: Step, dtype: torch.dtype) -> tuple[Rows, Rows]:
    """Random rows for every layer, stored: K and V, and activations."""
    batch = step.mini_batches[0]
    kv = [torch.randn(batch.num_queries, sizes.layers[0].kv.width).to(dtype) for _ in range(sizes.num_layers)]
    x = [torch.randn(batch.num_queries, sizes.hidden_size).to(dtype) for _ in range(sizes.num_layers)]
    rows = {pool: Stores.of(pool, rows, torch.from_numpy) for pool, rows in batch.stores.items()}
    for layer in range(sizes.num_layers):
        for tier in Tier:
            cache.store(tier, layer, rows, kv[layer], x[layer])
    cache.stored()
    return kv, x


def rows_of(rows: torch.Tensor, blocks: Sequence[tuple[PoolId, int]], kind: BlockKind) -> torch.Tensor:
    """Rows of the tokens in blocks of one kind, in token order."""
    tokens = [
        token
        for i, (pool, _) in enumerate(blocks)
        for token in range(i * BLOCK_SIZE, min((i + 1) * BLOCK_SIZE, len(rows)))
        if pool.kind is kind
    ]
    return rows[tokens]


SCATTERED = (7, 2, 3, 20, 11, 0)
MIXED = [pool for _ in range(2) for pool in PoolId][:6]
TABLES = {pool.name: [(pool, index) for index in SCATTERED] for pool in PoolId}
TABLES |= {"mixed": list(zip(MIXED, SCATTERED, strict=True))}
TABLES |= {"neighbours": [(PoolId.HOST_ACTIVATION, index) for index in range(9, 15)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 4, 22])
@pytest.mark.parametrize("table", TABLES)
async def test_what_is_stored_comes_back(
    table: str, num_tokens: int, dtype: torch.dtype, reference: Callable[[str], Reference]
) -> None:
    """From each pool, scattered and neighbouring blocks, the last one partly full: the same bits in every layer."""
    sizes = load_spec(reference("opt").directory, dtype).sizes
    blocks = TABLES[table][: -(-num_tokens // BLOCK_SIZE)]
    request = make_request(blocks, num_tokens + 2)
    async with managing(sizes, dtype) as cache, asyncio.timeout(20):
        kv, x = store_all(cache, sizes, make_step(request, 0, num_tokens), dtype)
        for index in (NUM_BLOCKS - 1, NUM_BLOCKS - 2):
            request.blocks.append(PoolId.HOST_KV, index)
        step = make_step(request, num_tokens, 2)
        gathers = cache.gathers(step.mini_batches[0], torch.from_numpy)
        await cache.begin(step)
        for layer in range(sizes.num_layers):
            staged = await cache.take()
            cache.gather(staged.buffers, gathers, layer)
            for kind, rows, buffer in (
                (BlockKind.KV, kv[layer], staged.buffers.kv),
                (BlockKind.ACTIVATION, x[layer], staged.buffers.activations),
            ):
                wanted = rows_of(rows, blocks, kind)
                assert torch.equal(buffer[: len(wanted)], wanted)
            cache.give_back(staged, None)
        host = [i for i, (pool, _) in enumerate(blocks) if pool.tier is Tier.HOST]
        assert (cache.loaded_bytes > 0) == bool(host)


async def test_only_host_blocks_count_as_loaded(sizes: ModelSizes) -> None:
    """Bytes over the bus: K and V, or activations, of the host's rows, all layers."""
    for pool in (PoolId.HOST_KV, PoolId.HOST_ACTIVATION):
        token_bytes = sizes.max_row_bytes(pool.kind)
        async with managing(sizes) as cache, asyncio.timeout(20):
            request = make_request([(pool, 3), (PoolId.DEVICE_KV, 3)], 7)
            await run(cache, sizes, make_step(request, 6, 1))
            assert cache.loaded_bytes == BLOCK_SIZE * token_bytes * sizes.num_layers


async def run(cache: CacheManager, sizes: ModelSizes, step: Step) -> None:
    await cache.begin(step)
    await cache.drain(sizes.num_layers)


async def test_loads_are_ahead_by_the_buffers_and_no_further(sizes: ModelSizes) -> None:
    """The next load waits for a buffer, and a buffer that was taken is not written to."""
    async with managing(sizes) as cache, asyncio.timeout(20):
        request = make_request([(PoolId.HOST_KV, 3), (PoolId.HOST_KV, 9)], 5)
        per_layer = 4 * sizes.max_row_bytes(BlockKind.KV)
        await cache.begin(make_step(request, 4, 1))
        await until(cache._ready.full)
        await asyncio.sleep(0.01)
        assert cache.loaded_bytes == BUFFERS * per_layer
        taken = [await cache.take() for _ in range(BUFFERS)]
        assert len({staged.buffers.kv.data_ptr() for staged in taken}) == BUFFERS
        await asyncio.sleep(0.01)
        assert cache.loaded_bytes == BUFFERS * per_layer
        cache.give_back(taken[0], None)
        await until(lambda: cache._ready.qsize() == 1)
        assert cache.loaded_bytes == (BUFFERS + 1) * per_layer


async def test_an_abandoned_step_loads_nothing_more(sizes: ModelSizes) -> None:
    """Its buffers still come, so that they can be taken and given back; the next step finds them all."""
    async with managing(sizes) as cache, asyncio.timeout(20):
        request = make_request([(PoolId.HOST_KV, 3), (PoolId.HOST_KV, 9)], 5)
        await cache.begin(make_step(request, 4, 1))
        await until(cache._ready.full)
        request.finish_reason = FinishReason.ABORTED
        loaded = cache.loaded_bytes
        await cache.drain(sizes.num_layers)
        assert cache.loaded_bytes == loaded
        assert cache._free.full()
        await run(cache, sizes, make_step(make_request([(PoolId.HOST_KV, 3), (PoolId.HOST_KV, 9)], 5), 4, 1))
        assert cache.loaded_bytes == loaded + sizes.num_layers * 4 * sizes.max_row_bytes(BlockKind.KV)


async def test_a_request_without_cache_loads_nothing(sizes: ModelSizes) -> None:
    """A prompt's first chunk has nothing to load; its buffers come all the same."""
    async with managing(sizes) as cache, asyncio.timeout(20):
        await run(cache, sizes, make_step(make_request([(PoolId.HOST_KV, 0)], 4), 0, 4))
        assert cache.loaded_bytes == 0
        assert cache._free.full()
