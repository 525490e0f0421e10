"""transformers `generate` with accelerate's CPU offload from pinned weights, and the offloaded cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate import cpu_offload
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from benchmarks.peers import cuda_memory
from benchmarks.peers.cases import Setup, random_prompts, sizes_of
from benchmarks.peers.record import PeerRun, Timing, Traffic
from hsrpc.model.shapes import SHAPES

_DEVIATION = 0.02
_WARM_UP_PROMPT = 32


def run(setup: Setup) -> PeerRun:
    """Load, warm up, generate."""
    pinned = cuda_memory.PinnedWeights()
    started = time.perf_counter()
    model = cpu_offload(*empty_model_and_weights(setup.model, pinned.random, torch.device("cuda", 0)))
    loaded = time.perf_counter()
    cuda_memory.reset_peak()
    timing = generate(model, setup, torch.device("cuda", 0), "offloaded", torch.cuda.synchronize)
    traffic = _traffic(setup, pinned.num_bytes)
    return PeerRun(
        timing=timing,
        traffic=traffic,
        peak_device_bytes=cuda_memory.peak_bytes(),
        host_bytes=pinned.num_bytes + _cache_bytes(setup) + cuda_memory.pinned_by_torch(),
        load_seconds=loaded - started,
    )


def empty_model_and_weights(
    name: str, make: Callable[[torch.Size, float, float], torch.Tensor], device: torch.device
) -> tuple[Any, torch.device, bool, dict[str, torch.Tensor]]:
    """Arguments of `cpu_offload`: a model without memory, its device, buffers too, and its random weights."""
    config = OPTConfig(
        **{key: value for key, value in SHAPES[name].items() if key not in ("architectures", "model_type")}
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config).half().eval()
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight":
            mean = 1.0 if key.endswith("layer_norm.weight") else 0.0
            weights[key] = make(tensor.shape, mean, _DEVIATION)
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    return model, device, False, weights


def generate(model: Any, setup: Setup, device: torch.device, cache: str, synchronize: Callable[[], object]) -> Timing:
    """One short run that warms up, then the one that counts, each step timed when its tokens are there."""
    prompts = torch.tensor(random_prompts(setup), device=device)
    _generate(model, prompts[:, :_WARM_UP_PROMPT], 1, cache, lambda: None)
    times: list[float] = []

    def note() -> None:
        synchronize()
        times.append(time.perf_counter())

    note()
    _generate(model, prompts, setup.steps or setup.output, cache, note)
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(prefill=gaps[0], steps=gaps[1:])


def _generate(model: Any, prompts: torch.Tensor, output: int, cache: str, note: Callable[[], None]) -> None:
    def after_step(tokens: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        note()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    settings = GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=1, cache_implementation=cache
    )
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=settings, stopping_criteria=[after_step]
    )
    if tokens.shape[1] != prompts.shape[1] + output:
        raise ValueError(f"{tokens.shape[1] - prompts.shape[1]} new tokens, not {output}: generation stopped early")


def _cache_bytes(setup: Setup) -> int:
    sizes = sizes_of(setup.model)
    return (setup.batch or 0) * (setup.prompt + setup.output) * sizes.num_layers * sizes.kv_bytes


def _traffic(setup: Setup, weights: int) -> Traffic:
    """Of a step in the middle of the run."""
    sizes, batch, context = sizes_of(setup.model), setup.batch or 0, setup.prompt + setup.output // 2
    cache = batch * context * sizes.num_layers * sizes.kv_bytes
    return Traffic(batch=batch, context=context, weights=weights, cache=cache)
