"""Where device memory goes: buffers and workspace for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import PENDING_QUERIES, REGENERATE_ROWS, SAMPLE_ELEMENTS
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.sweep import BUFFERS

Floats: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = float | Floats
"""One candidate's, or an array of many; whole numbers too, which are exact below 2**53."""

_INDEX_BYTES = 8
_LOGIT_BYTES = 4
"""Logits are float32."""
_GRAPH_COLUMNS, _GRAPH_COLUMN_BYTES = 4, 4
"""Numbers of a request in a decode graph's input beside its block table, and the bytes of each."""
SPARE_SLOTS = 1
"""Rows of each pool on the device that belong to no block, in every layer."""
_INDICES = 8
"""Arrays of row numbers that a mini-batch brings along, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """What a step goes through on the device; numbers or arrays."""

    batch: Number
    rows: Number
    """Of a mini-batch's kv buffer."""
    activation_rows: Number
    queries: Number
    """New tokens of a mini-batch, at most."""
    step_tokens: Number
    """New tokens of a step, at most."""
    graph_batch: Number
    """Requests of the largest decode graph; 0: there are no graphs."""
    table: int
    """Blocks of a request at full length."""


def device_bytes(sizes: ModelSizes, staging: Staging) -> dict[DeviceUse, Number]:
    """Device memory beside weights of layers and blocks, by what it is for; pools have their spare rows alone."""
    buffer = staging.rows * sizes.kv_bytes + staging.activation_rows * sizes.activation_bytes
    graph_input = _GRAPH_COLUMN_BYTES * (_GRAPH_COLUMNS + staging.table)
    logits = _LOGIT_BYTES * sizes.vocab_size
    return {
        DeviceUse.FIXED: sizes.fixed_bytes,
        DeviceUse.CACHE_BUFFERS: BUFFERS * buffer,
        DeviceUse.CACHE_BLOCKS: pool_bytes(sizes, SPARE_SLOTS, SPARE_SLOTS),
        DeviceUse.HIDDEN_STATES: 2 * staging.step_tokens * sizes.activation_bytes,
        DeviceUse.WORKSPACE: workspace_bytes(sizes, staging),
        DeviceUse.GRAPH_BUFFERS: staging.graph_batch * (graph_input + logits),
        DeviceUse.GRAPHS: staging.graph_batch * (query_bytes(sizes) + logits),
    }


def pool_bytes(sizes: ModelSizes, kv_slots: int, activation_slots: int) -> int:
    """Pools of one tier in all layers, with a row a slot."""
    return sizes.num_layers * (kv_slots * sizes.kv_bytes + activation_slots * sizes.activation_bytes)


def query_bytes(sizes: ModelSizes) -> int:
    """Upper bound of what a forward pass allocates for one query."""
    width = 4 * sizes.hidden_size + 3 * sizes.num_heads * sizes.head_dim + 2 * sizes.kv_size + 3 * sizes.ffn_size
    # Of those launched ahead, what is stored: with a fused projection K and V keep the queries too.
    width += PENDING_QUERIES * (sizes.hidden_size + sizes.num_heads * sizes.head_dim + 2 * sizes.kv_size)
    return width * sizes.element_bytes + 8 * sizes.hidden_size


def workspace_bytes(sizes: ModelSizes, staging: Staging) -> Number:
    """Upper bound of what one mini-batch's forward pass, and sampling, allocate beside the planned buffers."""
    regenerate = 3 * np.minimum(staging.activation_rows, REGENERATE_ROWS) * sizes.kv_bytes
    logits = staging.batch * sizes.vocab_size
    sampling = 8 * logits + 48 * np.minimum(logits, SAMPLE_ELEMENTS)
    indices = _INDICES * _INDEX_BYTES * (staging.rows + staging.step_tokens)
    found: Number = staging.queries * query_bytes(sizes) + regenerate + sampling + indices
    return found
