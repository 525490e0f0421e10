"""The cache manager: what is stored comes back bit for bit, and what its lane loads counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.worker import Worker
from hsrpc.model.formats.rows import RowShape, ValueRows
from hsrpc.model.spec import load_spec
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import SamplingParams
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, MiniBatch, Scheduled, Step, StopFlag
from hsrpc.schedule.sweep import NOTHING_CARRIED, Lane, LayerPlacement, Op, OpKind
from hsrpc.schedule.windows import NO_WINDOWS
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import PATIENCE

BLOCK_SIZE = 4
NUM_BLOCKS = 24
Rows = list[torch.Tensor]


@pytest.fixture
def dtype() -> torch.dtype:
    """The element type of the caches and of the model."""
    return torch.float32


@pytest.fixture
def sizes(reference: Callable[[str], Reference], dtype: torch.dtype) -> ModelSizes:
    return load_spec(reference("opt").directory, dtype).sizes


def make_cache(sizes: ModelSizes, dtype: torch.dtype = torch.float32) -> CacheManager:
    """A manager with 24 blocks in each pool."""
    config = EngineConfig(device="cpu", max_batch=2, max_model_len=64, max_prefill_tokens=64, block_size=BLOCK_SIZE)
    plan = Planner(sizes, Budgets(device=2**30, host=2**30), HARDWARE, config).plan()
    buffers = replace(plan.buffers, activation_rows=plan.buffers.rows)
    plan = replace(plan, num_blocks=dict.fromkeys(PoolId, NUM_BLOCKS), buffers=buffers)
    formats = {kind: ValueRows(RowShape(1, (sizes.layers[0].row(kind).width,)), dtype) for kind in BlockKind}
    return CacheManager(sizes, plan, CpuDevice(), formats)


def make_request(blocks: Sequence[tuple[PoolId, int]], num_tokens: int) -> Request:
    """A request of `num_tokens` tokens in these blocks."""
    request = Request("a", [5] * num_tokens, SamplingParams(), 0, 0.0)
    for pool, index in blocks:
        request.blocks.append(pool, index)
    return request


def make_step(sizes: ModelSizes, *parts: tuple[Request, int, int]) -> Step:
    """Mini-batches of one request each: `count` tokens behind `context`."""
    chunks = tuple((Chunk(request, context, count, samples=True),) for request, context, count in parts)
    layers = (LayerPlacement(),) * sizes.num_layers
    assembler = Assembler(layers=layers, block_size=BLOCK_SIZE, windows=NO_WINDOWS, max_queries=8)
    scheduled = Scheduled(step_id=1, mini_batches=chunks, sampling=(), stop=StopFlag())
    return assembler.assemble(scheduled, NOTHING_CARRIED)


def store_all(
    cache: CacheManager, sizes: ModelSizes, batch: MiniBatch, dtype: torch.dtype, tiers: Iterable[Tier] = Tier
) -> tuple[Rows, Rows]:
    """Random rows for every layer, of which those for `tiers` are stored: K and V, and activations."""
    kv = [torch.randn(batch.num_queries, sizes.layers[0].kv.width).to(dtype) for _ in range(sizes.num_layers)]
    x = [torch.randn(batch.num_queries, sizes.hidden_size).to(dtype) for _ in range(sizes.num_layers)]
    rows = cache.stores(batch, torch.from_numpy)
    for layer in range(sizes.num_layers):
        for tier in tiers:
            cache.store(tier, layer, rows, kv[layer], x[layer])
    return kv, x


def run_cache_lane(cache: CacheManager, step: Step, placed: Callable[[Op], object] = lambda _: None) -> None:
    """Load and gather as a step on one thread does; `placed` is called when a mini-batch's cached rows are there."""
    gathers = [cache.gathers(batch, torch.from_numpy) for batch in step.mini_batches]
    cache.begin(step)
    for op in step.ops.ops:
        if op.kind is OpKind.LOAD_BLOCKS:
            cache.launch(op)
        elif op.kind is OpKind.PLACE:
            cache.gather(cache.buffers[op.slot], gathers[op.batch], op.layer)
        elif op.kind is OpKind.ATTEND:
            placed(op)


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
def test_what_is_stored_comes_back(table: str, num_tokens: int, dtype: torch.dtype, sizes: ModelSizes) -> None:
    """From each pool, scattered and neighbouring blocks, the last one partly full: the same bits in every layer."""
    blocks = TABLES[table][: -(-num_tokens // BLOCK_SIZE)]
    request, cache = make_request(blocks, num_tokens + 2), make_cache(sizes, dtype)
    kv, x = store_all(cache, sizes, make_step(sizes, (request, 0, num_tokens)).mini_batches[0], dtype)
    for index in (NUM_BLOCKS - 1, NUM_BLOCKS - 2):
        request.blocks.append(PoolId.HOST_KV, index)
    layers = []

    def check(op: Op) -> None:
        for kind, rows, buffer in zip(BlockKind, (kv[op.layer], x[op.layer]), cache.buffers[op.slot], strict=True):
            wanted = rows_of(rows, blocks, kind)
            assert torch.equal(buffer[: len(wanted)], wanted)
        layers.append(op.layer)

    run_cache_lane(cache, make_step(sizes, (request, num_tokens, 2)), check)
    assert layers == list(range(sizes.num_layers))
    host = [pool for pool, _ in blocks if pool.tier is Tier.HOST]
    assert (cache.loaded_bytes > 0) == bool(host)


@pytest.mark.parametrize("tier", Tier)
def test_a_tiers_rows_are_stored_by_themselves(tier: Tier, sizes: ModelSizes) -> None:
    """The device's are at once, on the compute stream; the host's go on a stream of their own."""
    cache, blocks = make_cache(sizes), [(PoolId.HOST_KV, 1), (PoolId.DEVICE_KV, 1)]
    request = make_request(blocks, 2 * BLOCK_SIZE + 2)
    batch = make_step(sizes, (request, 0, 2 * BLOCK_SIZE)).mini_batches[0]
    before, _ = store_all(cache, sizes, batch, torch.float32)
    after, _ = store_all(cache, sizes, batch, torch.float32, tiers=[tier])
    request.blocks.append(PoolId.HOST_KV, 2)

    def check(op: Op) -> None:
        for (pool, _), start in zip(blocks, (0, BLOCK_SIZE), strict=True):
            rows = slice(start, start + BLOCK_SIZE)
            wanted = after if pool.tier is tier else before
            assert torch.equal(cache.buffers[op.slot].kv[rows], wanted[op.layer][rows])

    run_cache_lane(cache, make_step(sizes, (request, 2 * BLOCK_SIZE, 2)), check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_mini_batch_finds_its_own_rows(dtype: torch.dtype, sizes: ModelSizes) -> None:
    """In the buffer that the list says, while the next one's are loaded to the other."""
    cache = make_cache(sizes, dtype)
    tables = [[(PoolId.HOST_KV, index), (PoolId.DEVICE_ACTIVATION, index)] for index in range(5)]
    requests = [make_request(table, 2 * BLOCK_SIZE) for table in tables]
    stored = [store_all(cache, sizes, make_step(sizes, (request, 0, 6)).mini_batches[0], dtype) for request in requests]
    seen = []

    def check(op: Op) -> None:
        kv, x = stored[op.batch]
        assert torch.equal(cache.buffers[op.slot].kv[:BLOCK_SIZE], kv[op.layer][:BLOCK_SIZE])
        assert torch.equal(cache.buffers[op.slot].activations[:2], x[op.layer][BLOCK_SIZE:])
        seen.append((op.layer, op.batch))

    run_cache_lane(cache, make_step(sizes, *((request, 6, 2) for request in requests)), check)
    assert seen == [(layer, batch) for layer in range(sizes.num_layers) for batch in range(5)]


def test_only_host_blocks_count_as_loaded(sizes: ModelSizes) -> None:
    """Bytes over the bus: K and V, or activations, of the host's rows, all layers."""
    for pool, token_bytes in (
        (PoolId.HOST_KV, sizes.max_row_bytes(BlockKind.KV)),
        (PoolId.HOST_ACTIVATION, sizes.max_row_bytes(BlockKind.ACTIVATION)),
    ):
        cache, request = make_cache(sizes), make_request([(pool, 3), (PoolId.DEVICE_KV, 3)], 7)
        run_cache_lane(cache, make_step(sizes, (request, 6, 1)))
        assert cache.loaded_bytes == BLOCK_SIZE * token_bytes * sizes.num_layers


@pytest.mark.parametrize("pool", PoolId)
def test_a_request_without_cache_loads_nothing(pool: PoolId, sizes: ModelSizes) -> None:
    """A prompt's first chunk has nothing to load: there is no operation for it, beside another that has."""
    cache, fresh, cached = make_cache(sizes), make_request([(pool, 0)], 4), make_request([(PoolId.HOST_KV, 1)] * 2, 5)
    run_cache_lane(cache, make_step(sizes, (fresh, 0, 4)))
    assert cache.loaded_bytes == 0
    step = make_step(sizes, (fresh, 0, 4), (cached, 4, 1))
    assert {op.batch for op in step.ops.ops if op.kind is OpKind.LOAD_BLOCKS} == {1}


async def test_its_task_runs_its_lane_step_after_step(sizes: ModelSizes) -> None:
    """Each step's own rows, also behind one that was given up in the middle, which loads nothing more."""
    cache, blocks = make_cache(sizes), [(PoolId.HOST_KV, 3), (PoolId.HOST_KV, 9)]
    layer_bytes = BLOCK_SIZE * sizes.max_row_bytes(BlockKind.KV)
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(PATIENCE), Worker("compute") as compute, Worker("weights") as weights:
        for stops_in in (None, 1, 0, None):
            step, before = make_step(sizes, (make_request(blocks, 5), 4, 1)), cache.loaded_bytes
            run = StepRun(step, CpuDevice())

            def launch(op: Op, stops_in: int | None = stops_in, step: Step = step) -> None:
                if op.kind is OpKind.ATTEND and op.layer == stops_in:
                    step.stop.set()

            await cache.steps.put(run)
            await asyncio.gather(run.run(Lane.COMPUTE, compute, launch), run.run(Lane.WEIGHTS, weights, launch))
            ended = [await run.ended.get() for _ in Lane]
            loaded = cache.loaded_bytes - before
            if stops_in is None:
                assert all(ended)
                assert loaded == sizes.num_layers * layer_bytes
            else:  # what was ahead of the operation, and what was under way
                assert not all(ended)
                assert loaded <= (stops_in + 3) * layer_bytes
    task.cancel()
    await asyncio.wait([task])
