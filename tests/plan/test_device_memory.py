"""Bounds of what steps allocate: each follows from the step's sizes, by its formula."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from hsrpc.device.device import CpuDevice
from hsrpc.model.sampler import Sampler
from hsrpc.plan.device_memory import SCORE_BYTES, Staging, device_bytes, query_bytes, score_rows
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import PENDING_QUERIES, REGENERATE_ROWS, SAMPLE_ELEMENTS
from tests.plan.test_plan import OPT_6_7B as SIZES

STAGING = Staging(batch=64, rows=9000, activation_rows=9000, queries=500, step_tokens=700, graph_batch=64, table=128)


def change(use: DeviceUse, **more: int) -> float:
    """Bytes that the line has more where a size is larger by what is given."""
    larger = replace(STAGING, **{name: getattr(STAGING, name) + count for name, count in more.items()})
    return float(device_bytes(SIZES, larger)[use] - device_bytes(SIZES, STAGING)[use])


def test_hidden_states_are_those_before_and_after_a_layer() -> None:
    """The hidden states of all tokens of a step."""
    assert device_bytes(SIZES, STAGING)[DeviceUse.HIDDEN_STATES] == 2 * 700 * SIZES.hidden_bytes
    assert change(DeviceUse.HIDDEN_STATES, step_tokens=10) == 20 * SIZES.hidden_bytes


def test_workspace_grows_with_queries_rows_and_logits() -> None:
    """A layer of the queries, indices of rows and tokens, logits; no more for regeneration than one GEMM's rows."""
    assert change(DeviceUse.WORKSPACE, queries=10) == query_bytes(SIZES, 10)
    assert change(DeviceUse.WORKSPACE, step_tokens=10) == change(DeviceUse.WORKSPACE, rows=10) == 10 * 64
    assert change(DeviceUse.WORKSPACE, activation_rows=10) == 0
    assert change(DeviceUse.WORKSPACE, activation_rows=-9000) == -3 * REGENERATE_ROWS * SIZES.layers[0].rebuilt_bytes
    assert change(DeviceUse.WORKSPACE, batch=1) == 8 * SIZES.vocab_size
    few = SAMPLE_ELEMENTS // SIZES.vocab_size - 64
    assert change(DeviceUse.WORKSPACE, batch=few) == pytest.approx(
        few * 8 * SIZES.vocab_size - 48 * (SAMPLE_ELEMENTS - (few + 64) * SIZES.vocab_size)
    )


def test_a_layer_of_a_query_takes_what_it_computes() -> None:
    """OPT's: QKV, MLP, norms; and twice what is kept of a mini-batch that is launched ahead."""
    hidden, element = SIZES.hidden_size, SIZES.compute_bytes
    computed, launched = (4 + 3 + 2 + 3 * 4) * hidden, 2 * (hidden + hidden + 2 * hidden)
    assert query_bytes(SIZES, 1) == (computed + launched) * element + 8 * hidden


def test_graphs_take_a_step_of_their_largest_batch() -> None:
    """Its layer and logits, and beside these its input and output."""
    logits = 4 * SIZES.vocab_size
    assert change(DeviceUse.GRAPHS, graph_batch=1) == query_bytes(SIZES, 1) + logits
    assert change(DeviceUse.GRAPH_BUFFERS, graph_batch=1) == 4 * (4 + 128) + logits
    drafts = query_bytes(SIZES, 64), 64 * (4 * (4 + 128) + SIZES.hidden_bytes)  # whose logits are made in parts
    assert tuple(change(use, graph_drafts=1) for use in (DeviceUse.GRAPHS, DeviceUse.GRAPH_BUFFERS)) == drafts
    none = device_bytes(SIZES, replace(STAGING, graph_batch=0))
    assert none[DeviceUse.GRAPHS] == none[DeviceUse.GRAPH_BUFFERS] == 0


@pytest.mark.parametrize("batch", [1, 64, 1000])
@pytest.mark.parametrize("queries", [1, 500, 8192])
def test_prompts_are_scored_in_what_the_workspace_has(batch: int, queries: int) -> None:
    """Rows of logits take no more than is planned for a layer and for sampling, which begins after them."""
    staging = replace(STAGING, batch=batch, queries=queries, rows=0, activation_rows=0, step_tokens=0)
    rows = score_rows(SIZES, batch, queries)
    assert rows >= 1
    planned = device_bytes(SIZES, staging)[DeviceUse.WORKSPACE] - queries * (
        PENDING_QUERIES * SIZES.layers[0].pending_bytes
    )
    assert SCORE_BYTES * SIZES.vocab_size * rows <= planned < SCORE_BYTES * SIZES.vocab_size * (rows + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_scored_row_takes(dtype: torch.dtype) -> None:
    """From the head's product to the table, as torch's profiler sees its allocations on the CPU."""
    rows, vocab = 8, 4000
    hidden, head = torch.randn(rows, 16, dtype=dtype), torch.randn(vocab, 16, dtype=dtype)
    sampler, token_ids = Sampler(CpuDevice().fetch), torch.arange(rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        sampler.score(functional.linear(hidden, head).float(), token_ids, 20)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert 8 * vocab * rows < max(accumulate(sizes)) <= SCORE_BYTES * vocab * rows
