"""vLLM's memory with its prefetch offloader, by arithmetic: what streams, and how many requests its cache has room for.

Layers go in groups, the last so many of each group to the host; buffers for the layers that are loaded ahead, and the
whole cache, are on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.peers.cases import Setup, sizes_of
from hsrpc.schedule.blocks import BlockKind

VLLM_OFFLOADS = ((1, 1, 2), (4, 3, 2), (2, 1, 1))
"""All layers on the host, three of four, and every other one."""
PREFILL_TOKENS = 8192
"""Prompt tokens of a step at most."""
BLOCK_SIZE = 16


def vllm_setups(setup: Setup, offloads: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Setup]:
    """One for each way to offload and each multiple of the requests that fit."""
    return [
        replace(each, batch=max(1, int(fill * room(each))))
        for offload in offloads
        for each in [replace(setup, offload=tuple(offload))]
        for fill in fills
    ]


def num_offloaded(setup: Setup) -> int:
    """Layers on the host."""
    group, on_host, _ = setup.offload
    return sum(layer % group >= group - on_host for layer in range(sizes_of(setup.model).num_layers))


def streamed_bytes(setup: Setup) -> int:
    """Weight bytes that a step copies to the device."""
    return num_offloaded(setup) * sizes_of(setup.model).layers[0].weight_bytes


def cache_bytes(setup: Setup) -> int:
    """Device bytes left for the cache.

    Raises:
        ValueError: there are none.
    """
    sizes = sizes_of(setup.model)
    buffers = min(setup.offload[2], num_offloaded(setup)) * sizes.layers[0].weight_bytes
    left = setup.budgets.device - (sizes.model_bytes - streamed_bytes(setup)) - buffers - setup.workspace
    if left <= 0:
        offload = "/".join(map(str, setup.offload))
        raise ValueError(f"--offload {offload} leaves no room for a cache; put more layers on the host")
    return left


def room(setup: Setup) -> int:
    """Requests whose whole cache is on the device at once; what all share is there once, in whole blocks."""
    tokens = cache_bytes(setup) // sizes_of(setup.model).token_bytes(BlockKind.KV)
    shared = setup.shared // BLOCK_SIZE * BLOCK_SIZE
    own = -(-(setup.prompt + setup.output - shared) // BLOCK_SIZE) * BLOCK_SIZE
    return max(1, (tokens - shared) // own)
