"""Layers in which activation blocks hold K and V, by the plan: stores, loads and gathers of such blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.model.formats.rows import RowShape, ValueRows
from hsrpc.model.spec import load_spec
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import SamplingParams
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, Scheduled, Step, StopFlag
from hsrpc.schedule.sweep import NOTHING_CARRIED, LayerPlacement, OpKind
from hsrpc.schedule.windows import NO_WINDOWS
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference

BLOCK_SIZE = 4
NUM_TOKENS = 38
NUM_LAYERS = 4
KV_LAYERS = frozenset({1, 2})


@pytest.fixture(scope="module")
def sizes(reference: Callable[[str], Reference]) -> ModelSizes:
    return load_spec(reference("opt").directory, torch.float32).sizes


@pytest.fixture
def plan(sizes: ModelSizes) -> Plan:
    """24 blocks in each pool."""
    config = EngineConfig(device="cpu", max_batch=2, max_model_len=64, max_prefill_tokens=64, block_size=BLOCK_SIZE)
    made = Planner(sizes, Budgets(device=2**30, host=2**30), HARDWARE, config).plan()
    buffers = replace(made.buffers, activation_rows=made.buffers.rows)
    return replace(made, num_blocks=dict.fromkeys(PoolId, 24), buffers=buffers, kv_layers=KV_LAYERS)


def make_cache(sizes: ModelSizes, plan: Plan) -> CacheManager:
    widths = {kind: sizes.layers[0].row(kind).width for kind in BlockKind}
    formats = {kind: ValueRows(RowShape(1, (width,)), torch.float32) for kind, width in widths.items()}
    return CacheManager(sizes, plan, CpuDevice(), formats)


def make_step(plan: Plan, request: Request, context: int, count: int) -> Step:
    layers = tuple(LayerPlacement(0, rebuilds=layer not in plan.kv_layers) for layer in range(NUM_LAYERS))
    assembler = Assembler(layers=layers, block_size=BLOCK_SIZE, windows=NO_WINDOWS, max_queries=64)
    chunk = Chunk(request, context, count, samples=True)
    scheduled = Scheduled(step_id=1, mini_batches=((chunk,),), sampling=(), stop=StopFlag())
    return assembler.assemble(scheduled, NOTHING_CARRIED)


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("tier", Tier)
def test_activation_blocks_come_back_as_what_they_hold(tier: Tier, num_new: int, plan: Plan, sizes: ModelSizes) -> None:
    """Bit for bit, after a long prompt and a token: activations, or K and V in the rows that rebuilding would fill."""
    kinds = [BlockKind.ACTIVATION] * 7 + [BlockKind.KV, BlockKind.ACTIVATION, BlockKind.KV]
    request = Request("a", [5] * (NUM_TOKENS + num_new), SamplingParams(), 0, 0.0)
    for kind, index in zip(kinds, (3, 4, 5, 6, 7, 20, 2, 11, 0, 9), strict=True):
        request.blocks.append(next(pool for pool in PoolId if (pool.kind, pool.tier) == (kind, tier)), index)
    cache = make_cache(sizes, plan)
    kv, x = (torch.randn(NUM_LAYERS, NUM_TOKENS, width) for width in (sizes.layers[0].kv.width, sizes.hidden_size))
    for start, end in ((0, NUM_TOKENS - 1), (NUM_TOKENS - 1, NUM_TOKENS)):
        stores = cache.stores(make_step(plan, request, start, end - start).mini_batches[0], torch.from_numpy)
        for layer in range(NUM_LAYERS):
            cache.store(tier, layer, stores, kv[layer, start:end], x[layer, start:end])
    step = make_step(plan, request, NUM_TOKENS, num_new)
    (batch,) = step.mini_batches
    gathers = cache.gathers(batch, torch.from_numpy)
    cache.begin(step)
    loads = {op.layer: op for op in step.ops.ops if op.kind is OpKind.LOAD_BLOCKS}
    assert len(loads) == (NUM_LAYERS if tier is Tier.HOST else 0)
    rebuilt = [token for token in range(NUM_TOKENS) if kinds[token // BLOCK_SIZE] is BlockKind.ACTIVATION]
    for layer in range(NUM_LAYERS):
        for buffer in cache.buffers[0]:
            buffer.zero_()
        if layer in loads:
            cache.launch(loads[layer]._replace(slot=0))
        cache.gather(cache.buffers[0], gathers, layer)
        buffers, rows = cache.buffers[0], torch.from_numpy(batch.widest.activation_rows)
        if layer in KV_LAYERS:
            assert torch.equal(buffers.kv[rows], kv[layer, rebuilt])
            assert not buffers.activations.any()
        else:
            assert torch.equal(buffers.activations[: len(rebuilt)], x[layer, rebuilt])
            assert not buffers.kv[rows].any()
    kv_bytes, activation_bytes = sizes.layers[0].kv.num_bytes, sizes.layers[0].activation.num_bytes
    held = sum(kv_bytes if layer in KV_LAYERS else activation_bytes for layer in range(NUM_LAYERS))
    num_kv = NUM_TOKENS - len(rebuilt)
    loaded = len(rebuilt) * held + num_kv * NUM_LAYERS * sizes.layers[0].kv.num_bytes
    assert cache.loaded_bytes == (loaded if tier is Tier.HOST else 0)


def test_pools_are_as_wide_as_what_they_hold(plan: Plan, sizes: ModelSizes) -> None:
    """The pools of KV blocks in every layer alike, those of activation blocks by the plan."""
    cache = make_cache(sizes, plan)
    for pool, layers in cache._pools.items():
        wide = set(range(NUM_LAYERS)) if pool.kind is BlockKind.KV else KV_LAYERS
        assert {layer for layer, rows in enumerate(layers) if rows.shape[1] == sizes.layers[0].kv.width} == wide
        assert {rows.shape[1] for rows in layers} <= {sizes.layers[0].kv.width, sizes.hidden_size}


def test_only_activations_are_stored_in_runs(plan: Plan, sizes: ModelSizes) -> None:
    """A copy engine takes rows that are contiguous, which K and V of a fused projection are not."""
    request = Request("a", [5] * NUM_TOKENS, SamplingParams(), 0, 0.0)
    for index in range(10):
        request.blocks.append(PoolId.HOST_ACTIVATION, index)
    cache = make_cache(sizes, plan)
    stores = cache.stores(make_step(plan, request, 0, NUM_TOKENS).mini_batches[0], torch.from_numpy)
    assert stores[BlockKind.ACTIVATION][PoolId.HOST_ACTIVATION].runs.num_rows == NUM_TOKENS
    assert stores[BlockKind.KV][PoolId.HOST_ACTIVATION].runs.num_rows == 0
    assert len(stores[BlockKind.KV][PoolId.HOST_ACTIVATION].rows.target) == NUM_TOKENS
