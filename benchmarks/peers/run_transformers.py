"""transformers `generate` with model and static cache on the GPU; it may compile its decode steps.

As of version 5.17 it compiles them by itself where the cache is static, on a GPU, and into CUDA graphs; without, each
layer is launched kernel by kernel. Its prompts are never compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.peers import cuda_memory
from benchmarks.peers.cases import Setup
from benchmarks.peers.generation import Maker, empty_model, generate, random_weights
from benchmarks.peers.record import PeerRun, Timing, Traffic


def run(setup: Setup) -> PeerRun:
    """Load, warm up, generate."""
    started = time.perf_counter()
    model = resident_model(setup.model, cuda_memory.random_on_gpu)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    cuda_memory.reset_peak()
    timing = generate_resident(model, setup, torch.device("cuda", 0), torch.cuda.synchronize)
    return PeerRun(
        timing=timing,
        traffic=Traffic(batch=setup.batch or 0, context=setup.mean_context, weights=0, cache=0),
        peak_device_bytes=cuda_memory.peak_bytes(),
        host_bytes=cuda_memory.pinned_by_torch(),
        load_seconds=loaded - started,
    )


def resident_model(name: str, make: Maker) -> Any:
    """A model whose weights are the tensors that `make` gives."""
    model = empty_model(name)
    model.load_state_dict(random_weights(model, make), assign=True)
    return model


def generate_resident(
    model: Any, setup: Setup, device: torch.device, synchronize: Callable[[], object], **settings: object
) -> Timing:
    """The run that warms up has the very shapes of the one that counts, because it is the one that compiles.

    Raises:
        ValueError: transformers compiled and should not have, or did not and should have.
    """
    before = _num_graphs()
    timing = generate(
        model,
        setup,
        device,
        synchronize,
        warm_up=(setup.prompt, setup.steps or setup.output),
        cache_implementation="static",
        disable_compile=not setup.compiled,
        **settings,
    )
    if (_num_graphs() > before) != setup.compiled:
        raise ValueError(
            f"compiled={setup.compiled}: transformers did otherwise; use version 5.17, or measure the other"
        )
    return timing


def _num_graphs() -> int:
    """Compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])
