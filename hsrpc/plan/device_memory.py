"""Where device memory goes: buffers and workspace for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hsrpc.plan.plan import BUFFERS, PENDING_QUERIES, REGENERATE_ROWS, SAMPLE_ELEMENTS
from hsrpc.plan.sizes import ModelSizes

Floats: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = float | Floats
"""One candidate's, or an array of many; whole numbers too, which are exact below 2**53."""

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
    """Of a mini-batch's kv buffer."""
    activation_rows: Number
    queries: Number
    """New tokens of a mini-batch, at most."""
    step_tokens: Number
    """New tokens of a step, at most."""


def device_bytes(sizes: ModelSizes, staging: Staging) -> dict[str, Number]:
    """Device memory beside weights of layers and blocks, by what it is for."""
    buffer = staging.rows * sizes.kv_bytes + staging.activation_rows * sizes.activation_bytes
    return {
        "embeddings and head": sizes.fixed_bytes,
        "cache buffers": BUFFERS * buffer,
        "hidden states": 2 * staging.step_tokens * sizes.activation_bytes,
        "workspace": workspace_bytes(sizes, staging),
        "decode graphs": staging.batch * (query_bytes(sizes) + _GRAPH_LOGIT_BYTES * sizes.vocab_size),
    }


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
