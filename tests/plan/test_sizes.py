"""Layers that differ: what is summed, what is averaged, and what later kinds of layers may answer in their own way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hsrpc.config import EngineConfig
from hsrpc.plan.device_memory import Staging, device_bytes, query_bytes
from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import CacheRow, ExpertSizes, LayerSizes
from hsrpc.schedule.blocks import BlockKind
from tests.plan.test_plan import GIB, PCIE4_4090, make_layer, make_sizes

NUM_EXPERTS, NUM_ACTIVE = 8, 2


def experts(layer: LayerSizes) -> LayerSizes:
    """The layer with an MLP of eight experts, of which a token goes through two."""
    mlp = [tensor for tensor in layer.tensors if tensor.name in ("up", "down")]
    elements = sum(tensor.num_elements for tensor in mlp) // NUM_EXPERTS
    of_experts = ExpertSizes(
        count=NUM_EXPERTS,
        k=NUM_ACTIVE,
        names=frozenset({"up", "down"}),
        num_elements=elements,
        device_bytes=elements * layer.compute_bytes,
    )
    return replace(layer, ffn_size=layer.ffn_size * NUM_ACTIVE // NUM_EXPERTS, experts=of_experts)


DENSE = make_layer(hidden=256, kv=256, ffn=1024, compute_bytes=2)
EXPERTS = experts(make_layer(hidden=256, kv=256, ffn=8192, compute_bytes=2))
MIXED = replace(make_sizes(hidden=256, heads=4), layers=(DENSE, EXPERTS, EXPERTS, EXPERTS))


def test_equal_layers_are_one():
    """They are counted, and asked once, in the order in which they come first."""
    asked: list[LayerSizes] = []
    sizes = replace(MIXED, layers=(EXPERTS, DENSE, EXPERTS, EXPERTS, DENSE))

    def ask(layer: LayerSizes) -> float:
        asked.append(layer)
        return float(layer.ffn_size)

    assert sizes.distinct == ((EXPERTS, 3), (DENSE, 2))
    assert sizes.kinds == (0, 1, 0, 0, 1)
    assert sizes.mean(ask) == pytest.approx((3 * 2048 + 2 * 1024) / 5)
    assert sizes.largest(ask) == 2048
    assert asked == [EXPERTS, DENSE] * 2
    assert sizes.commonest == EXPERTS
    assert sizes.layers_bytes == 3 * EXPERTS.weight_bytes + 2 * DENSE.weight_bytes


def test_the_mean_is_taken_of_each_candidate():
    """Arrays of many candidates are averaged one by one."""
    tokens = np.array([1.0, 64.0])
    expected = [(DENSE.flop(n) + 3 * EXPERTS.flop(n)) / 4 for n in (1, 64)]
    assert MIXED.mean(lambda layer: layer.flop(tokens)) == pytest.approx(expected)


@pytest.mark.parametrize("queries", [1, 4, 64])
def test_few_tokens_read_few_experts(queries: int):
    """The time of a layer is the longer of its own compute and its own reads, averaged over the layers."""
    seconds = LayerTimes(MIXED, PCIE4_4090, math.inf).forward(np.array([float(queries)]))
    each = [
        max(layer.flop(queries) / PCIE4_4090.gemm_rate, layer.read_bytes(queries) / PCIE4_4090.memory_bandwidth)
        for layer in MIXED.layers
    ]
    assert seconds == pytest.approx([sum(each) / 4])
    experts = EXPERTS.experts
    worked = EXPERTS.num_elements - (NUM_EXPERTS - NUM_ACTIVE) * experts.num_elements
    assert EXPERTS.flop(queries) == 2 * queries * worked
    one = experts.device_bytes
    others = EXPERTS.weight_bytes - NUM_EXPERTS * one
    assert EXPERTS.read_bytes(queries) == pytest.approx(others + (1 - 0.75**queries) * NUM_EXPERTS * one)


def test_groups_of_mini_batches_read_for_their_own_tokens():
    """Two groups of 4 tokens read what 4 tokens need, twice."""
    slow = replace(PCIE4_4090, memory_bandwidth=1e9)
    seconds = LayerTimes(MIXED, slow).forward(8.0, 2.0)
    assert seconds == pytest.approx(2 * sum(layer.read_bytes(4) for layer in MIXED.layers) / 4 / 1e9)


def test_the_workspace_is_that_of_the_largest_layer():
    """Two experts as wide as the dense MLP each, with an output each and scores of all; the planner plans for it."""
    wide = EXPERTS.workspace_bytes(10)
    assert wide == 10 * (2 * (4 * 256 + 3 * 256 + 2 * 256 + 3 * 2048 + 2 * 256) + 8 * 256 + 16 * NUM_EXPERTS)
    assert query_bytes(MIXED, 10) == wide + 10 * 2 * EXPERTS.pending_bytes
    staging = Staging(batch=4, rows=100, activation_rows=50, queries=20, step_tokens=30, graph_batch=0, table=1)
    dense = replace(MIXED, layers=(DENSE,) * 4)
    larger, smaller = (device_bytes(sizes, staging) for sizes in (MIXED, dense))
    assert larger[DeviceUse.CACHE_BUFFERS] == smaller[DeviceUse.CACHE_BUFFERS] == 2 * (100 * 2 * 256 + 50 * 256) * 2
    difference = query_bytes(MIXED, 20) - query_bytes(dense, 20)
    assert larger[DeviceUse.WORKSPACE] - smaller[DeviceUse.WORKSPACE] == difference > 0


def test_a_model_with_experts_is_planned():
    """As fast as its active experts where the GPU is the longer side."""
    slow = replace(PCIE4_4090, gemm_rate=1e11, load_bandwidth=1e12)
    config = EngineConfig(max_batch=64, expected_context=64, placement="host", cache_policy="kv")
    budgets = Budgets(device=GIB, host=GIB)
    all_active = replace(MIXED, layers=tuple(replace(layer, experts=None) for layer in MIXED.layers))
    active, every = (Planner(sizes, budgets, slow, config).plan().prediction for sizes in (MIXED, all_active))
    flop = [sum(layer.flop(64) for layer in sizes.layers) for sizes in (MIXED, all_active)]
    assert (active.forward, every.forward) == pytest.approx([each / slow.gemm_rate for each in flop])


def test_a_latent_is_an_activation_of_its_own_width():
    """Multi-head latent attention: 576 elements from which K and V of 128 heads are rebuilt."""
    width, latent = 128 * 160, 576
    layer = replace(
        DENSE,
        key_size=width,
        value_size=width,
        kv=CacheRow(2 * width, 4 * width),
        activation=CacheRow(latent, 2 * latent),
    )
    sizes = replace(MIXED, layers=(layer, layer))
    assert layer.regenerate_flop == 2 * latent * 2 * width
    assert sizes.activation_ratio == pytest.approx(40_960 / 576)
    assert [sizes.token_bytes(kind) for kind in BlockKind] == [2 * 4 * width, 2 * 2 * latent]
    budgets = Budgets(device=8 * GIB, host=8 * GIB)
    configs = (EngineConfig(max_batch=16, placement="host", cache_policy=each) for each in ("kv", "activation"))
    kv, plan = (Planner(sizes, budgets, PCIE4_4090, config).plan() for config in configs)
    assert plan.prediction.step < kv.prediction.step / 5
    assert plan.host_bytes[HostUse.CACHE_BLOCKS] == sum(plan.num_blocks.values()) * 16 * 2 * 2 * latent


def test_rows_of_layers_may_differ():
    """Blocks take the sum of all layers, buffers the widest row, and the share is decided for all together."""
    narrow = make_layer(hidden=256, kv=64, ffn=1024, compute_bytes=2)
    sizes = replace(MIXED, layers=(DENSE, narrow, narrow))
    assert sizes.token_bytes(BlockKind.KV) == 2 * 2 * (256 + 64 + 64)
    assert sizes.max_row_bytes(BlockKind.KV) == 2 * 2 * 256
    assert sizes.mean_row_bytes(BlockKind.KV) == 2 * 2 * 128
    assert sizes.activation_ratio == 1.0
