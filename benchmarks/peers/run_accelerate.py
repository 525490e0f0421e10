"""transformers `generate` with accelerate's CPU offload and the offloaded cache; weights pageable or pinned."""

from __future__ import annotations

import time

import torch
from accelerate import cpu_offload

from benchmarks.peers import cuda_memory
from benchmarks.peers.cases import Setup, System, sizes_of
from benchmarks.peers.generation import empty_model, generate, random_weights
from benchmarks.peers.record import PeerRun, Traffic
from hsrpc.schedule.blocks import BlockKind

WARM_UP = (32, 1)
"""Tokens of a prompt, and new ones: nothing is compiled, and a step takes seconds."""


def run(setup: Setup) -> PeerRun:
    """Load, warm up, generate."""
    pinned, device = cuda_memory.PinnedWeights(), torch.device("cuda", 0)
    make = pinned.random if setup.system is System.ACCELERATE_PINNED else _pageable
    started = time.perf_counter()
    model = empty_model(setup.model)
    model = cpu_offload(model, device, state_dict=random_weights(model, make))
    loaded = time.perf_counter()
    cuda_memory.reset_peak()
    timing = generate(model, setup, device, torch.cuda.synchronize, warm_up=WARM_UP, cache_implementation="offloaded")
    weights = sizes_of(setup.model).model_bytes
    return PeerRun(
        timing=timing,
        traffic=_traffic(setup, weights),
        peak_device_bytes=cuda_memory.peak_bytes(),
        host_bytes=weights + max(_cache_bytes(setup), cuda_memory.pinned_by_torch()),  # the cache is pinned
        load_seconds=loaded - started,
    )


def _pageable(shape: torch.Size, mean: float, deviation: float) -> torch.Tensor:
    return cuda_memory.random_on_gpu(shape, mean, deviation).cpu()


def _cache_bytes(setup: Setup) -> int:
    sizes = sizes_of(setup.model)
    return (setup.batch or 0) * (setup.prompt + setup.output) * sizes.token_bytes(BlockKind.KV)


def _traffic(setup: Setup, weights: int) -> Traffic:
    """What moves in a step in the middle of the run."""
    sizes, batch, context = sizes_of(setup.model), setup.batch or 0, setup.mean_context
    cache = batch * context * sizes.token_bytes(BlockKind.KV)
    return Traffic(batch=batch, context=context, weights=weights, cache=cache)
