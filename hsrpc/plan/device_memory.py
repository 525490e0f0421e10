"""Where device memory goes: buffers and workspace for a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsrpc.plan.fitted import GRAPH_BYTES
from hsrpc.plan.graph_sizes import num_segment_graphs
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import PENDING_QUERIES, REGENERATE_ROWS, SAMPLE_ELEMENTS
from hsrpc.plan.sizes import LayerSizes, ModelSizes, Number
from hsrpc.schedule.blocks import BlockKind
from hsrpc.schedule.sweep import BUFFERS

_INDEX_BYTES = 8
_LOGIT_BYTES = 4
"""Logits are float32."""
SCORE_BYTES = 24
"""Bytes for a logit that a prompt's token is scored by: of the model's type and of float32, its logarithm, and more to
find the best."""
_GRAPH_COLUMNS, _GRAPH_COLUMN_BYTES = 4, 4
"""Numbers of a request in a decode graph's input beside its block table, and the bytes of each."""
_QUERY_PARTS, _PART_BYTES = 32, 4
"""Parts that a query's keys are divided into, at most, and bytes of an element of what each gathers."""
_ALL_PARTS_BYTES = 64 * 1024**2
"""Bytes for all queries: more of them are divided into fewer parts."""
SPARE_SLOTS = 1
"""Rows of each pool on the device that belong to no block, in every layer."""
_INDICES = 8
"""Arrays of row numbers that a mini-batch brings along for each window of the layers, at most."""
_MIN_SAMPLED = 64
"""Rows of logits, of a step with drafts: the head's weights are read once for so many."""
_LIBRARY_BYTES = 128 * 1024**2
"""cuBLAS' workspaces, of two streams and of graphs."""
_ROUNDED_PART = 100
"""CUDA's allocator rounds large tensors up to 2 MiB, as uploads do themselves: about this part of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Sizes of what a step goes through on the device, for one candidate or, as arrays, for many."""

    batch: Number
    drafts: Number = 0
    """Tokens that each request drafts in a step, at most."""
    rows: Number
    """Rows of a mini-batch's kv buffer."""
    activation_rows: Number
    queries: Number
    """New tokens of a mini-batch, at most."""
    step_tokens: Number
    """New tokens of a step, at most."""
    absorbing: Number = 0
    """Queries that attend to activations as they are stored, at most."""
    graph_batch: Number
    """Requests of the largest decode graph; 0: there are no graphs."""
    graph_drafts: Number = 0
    """Tokens that each of them drafts there."""
    num_segments: Number = 1
    """Graphs that a decode step is divided into."""
    table: int
    """Blocks of a request at full length."""


def device_bytes(sizes: ModelSizes, staging: Staging) -> dict[DeviceUse, Number]:
    """Device memory beside weights of layers and blocks, by what it is for; pools have their spare rows alone."""
    kv, activation = map(sizes.max_row_bytes, BlockKind)
    graph_input = _GRAPH_COLUMN_BYTES * (_GRAPH_COLUMNS + staging.table)
    graph_rows = staging.graph_batch * (1 + staging.graph_drafts)
    sampled = sampled_at_once(staging.graph_batch, staging.graph_drafts)
    logits = sampled * (_LOGIT_BYTES * sizes.vocab_size)
    return {
        DeviceUse.FIXED: sizes.fixed_bytes,
        DeviceUse.CACHE_BUFFERS: BUFFERS * (staging.rows * kv + staging.activation_rows * activation),
        DeviceUse.CACHE_BLOCKS: pool_bytes(sizes, SPARE_SLOTS, SPARE_SLOTS),
        DeviceUse.HIDDEN_STATES: 2 * staging.step_tokens * sizes.hidden_bytes,
        DeviceUse.WORKSPACE: workspace_bytes(sizes, staging),
        DeviceUse.GRAPH_BUFFERS: graph_rows * graph_input + logits + (graph_rows - sampled) * sizes.hidden_bytes,
        DeviceUse.GRAPHS: query_bytes(sizes, graph_rows)
        + _absorbed_bytes(sizes, np.minimum(staging.absorbing, graph_rows))
        + logits
        + num_segment_graphs(staging.graph_batch, staging.num_segments, staging.graph_drafts) * GRAPH_BYTES,
    }


def pool_bytes(sizes: ModelSizes, kv_slots: int, activation_slots: int) -> int:
    """Pools of one tier in all layers, with a row a slot."""
    return kv_slots * sizes.token_bytes(BlockKind.KV) + activation_slots * sizes.token_bytes(BlockKind.ACTIVATION)


def query_bytes(sizes: ModelSizes, queries: Number) -> Number:
    """Upper bound of the bytes that a forward pass allocates for `queries` tokens, with those launched ahead of it."""
    return sizes.largest(
        lambda layer: layer.workspace_bytes(queries) + queries * (PENDING_QUERIES * layer.pending_bytes)
    )


def workspace_bytes(sizes: ModelSizes, staging: Staging) -> Number:
    """Upper bound of the bytes that a mini-batch's forward pass and sampling allocate beside the planned buffers."""
    rows = 3 * np.minimum(staging.activation_rows, REGENERATE_ROWS)
    regenerate = rows * sizes.largest(lambda layer: layer.rebuilt_bytes)
    padded = staging.rows * sizes.largest(lambda layer: layer.padded_bytes)
    sampling = _sampling_bytes(sizes, sampled_at_once(staging.batch, staging.drafts))
    indices = _INDICES * _INDEX_BYTES * len(sizes.windows.distinct) * (staging.rows + staging.step_tokens)
    absorbed = _absorbed_bytes(sizes, staging.absorbing)
    found: Number = query_bytes(sizes, staging.queries) + regenerate + padded + absorbed + sampling + indices
    return found


def _sampling_bytes(sizes: ModelSizes, batch: Number) -> Number:
    logits = batch * sizes.vocab_size
    return 8 * logits + 48 * np.minimum(logits, SAMPLE_ELEMENTS)


def sampled_at_once(batch: Number, drafts: Number) -> Number:
    """Rows of logits that are sampled at a time: of a step without drafts all, of one with drafts hardly more."""
    found: Number = np.minimum(batch * (1 + drafts), np.maximum(batch, _MIN_SAMPLED))
    return found


def score_rows(sizes: ModelSizes, sampled: int, queries: int) -> int:
    """Rows of logits of prompts at a time that fit what a layer and sampling `sampled` rows have of the workspace.

    The last layer is done by then, and sampling has not begun.
    """
    room = sizes.largest(lambda layer: layer.workspace_bytes(queries)) + _sampling_bytes(sizes, sampled)
    return max(1, int(room) // (SCORE_BYTES * sizes.vocab_size))


def _absorbed_bytes(sizes: ModelSizes, queries: Number) -> Number:
    """Bytes for queries that attend to activations: what goes there and comes back, twice, and parts in float32."""

    def allocated(layer: LayerSizes) -> Number:
        absorbed = layer.absorbed
        if absorbed is None:
            return 0
        width = 2 * (absorbed.query_size + absorbed.attended_size + layer.attended_size)
        parts = np.minimum(queries * (_QUERY_PARTS * _PART_BYTES * absorbed.attended_size), _ALL_PARTS_BYTES)
        return queries * (width * layer.compute_bytes) + parts

    return sizes.largest(allocated)


def cuda_runtime_memory(budget: int) -> int:
    """Bytes that rounding and the libraries' own buffers take of a `budget` of a CUDA device's memory, in bytes."""
    return _LIBRARY_BYTES + budget // _ROUNDED_PART
