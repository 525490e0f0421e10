"""Where device memory goes: buffers and workspace for a batch, and the choices of which weights stay there."""

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


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    names: tuple[tuple[frozenset[str], ...], ...]
    """For each choice and layer, the packed tensors that stay."""
    resident: Floats
    """Bytes that stay, all layers."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them."""


def resident_choices(sizes: ModelSizes, shares: tuple[float, ...]) -> ResidentChoices:
    """The weights that stay for each of the given shares of all layers' bytes, at most."""
    total = sizes.num_layers * sizes.layer_bytes
    found = {spread_resident(sizes, int(share * total)): None for share in sorted(shares)}
    kept = [[sum(map(sizes.tensor_bytes, layer)) for layer in names] for names in found]
    resident = np.array([sum(layers) for layers in kept], dtype=np.float64)
    largest = np.array([sizes.layer_bytes - min(layers) for layers in kept], dtype=np.float64)
    return ResidentChoices(
        names=tuple(found),
        resident=resident,
        on_bus=(total - resident) * sizes.coded_share,
        on_host=np.ceil((total - resident) * sizes.max_coded_share),
        buffers=(BUFFERS + sizes.codes_weights) * largest,
    )


def spread_resident(sizes: ModelSizes, budget: int) -> tuple[frozenset[str], ...]:
    """Tensors that stay on the device in each layer: at most `budget` bytes in all, spread evenly over the layers.

    Layer by layer, largest first, the tensors stay that keep the running total within the budget's part so far.
    """
    by_size = sorted(((sizes.tensor_bytes(name), name) for name in sizes.layer_tensors), key=lambda item: -item[0])
    chosen: list[frozenset[str]] = []
    spent = 0
    for layer in range(1, sizes.num_layers + 1):
        names = []
        limit = budget * layer // sizes.num_layers
        for size, name in by_size:
            if spent + size <= limit:
                names.append(name)
                spent += size
        chosen.append(frozenset(names))
    return tuple(chosen)


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
