"""Where device memory goes: buffers and workspace for a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsrpc.plan.plan import BUFFERS, PENDING_QUERIES, REGENERATE_ROWS, SAMPLE_ELEMENTS
from hsrpc.plan.sizes import ModelSizes, Number
from hsrpc.schedule.blocks import BlockKind

_INDEX_BYTES = 8
_GRAPH_LOGIT_BYTES = 4 + 4
"""Logits are float32, and a graph keeps its own."""
_INDICES = 8
"""Arrays of row numbers that a mini-batch brings along, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """What a step goes through on the device; numbers or arrays."""

    batch: Number
    rows: Number
    """Rows of a mini-batch's kv buffer."""
    activation_rows: Number
    queries: Number
    """New tokens of a mini-batch, at most."""
    step_tokens: Number
    """New tokens of a step, at most."""


def device_bytes(sizes: ModelSizes, staging: Staging) -> dict[str, Number]:
    """Device memory beside weights of layers and blocks, by what it is for."""
    kv, activation = map(sizes.max_row_bytes, BlockKind)
    return {
        "embeddings and head": sizes.fixed_bytes,
        "cache buffers": BUFFERS * (staging.rows * kv + staging.activation_rows * activation),
        "hidden states": 2 * staging.step_tokens * sizes.hidden_bytes,
        "workspace": workspace_bytes(sizes, staging),
        "decode graphs": query_bytes(sizes, staging.batch) + staging.batch * (_GRAPH_LOGIT_BYTES * sizes.vocab_size),
    }


def query_bytes(sizes: ModelSizes, queries: Number) -> Number:
    """Upper bound of what a forward pass allocates for `queries` tokens, those that are launched ahead included."""
    return sizes.largest(
        lambda layer: layer.workspace_bytes(queries) + queries * (PENDING_QUERIES * layer.pending_bytes)
    )


def workspace_bytes(sizes: ModelSizes, staging: Staging) -> Number:
    """Upper bound of what one mini-batch's forward pass, and sampling, allocate beside the planned buffers."""
    rows = 3 * np.minimum(staging.activation_rows, REGENERATE_ROWS)
    regenerate = rows * sizes.largest(lambda layer: layer.rebuilt_bytes)
    logits = staging.batch * sizes.vocab_size
    sampling = 8 * logits + 48 * np.minimum(logits, SAMPLE_ELEMENTS)
    indices = _INDICES * _INDEX_BYTES * (staging.rows + staging.step_tokens)
    found: Number = query_bytes(sizes, staging.queries) + regenerate + sampling + indices
    return found
