"""vLLM 0.23 from its Python interface, with its prefetch offloader and its own prefix cache, and random weights.

Its engine runs in this process, where the allocator's limit makes the budget a hard one. Changed from outside, in its
favour: weights are filled from one random block, not drawn one by one on the CPU. Steps are eager: one takes hundreds
of milliseconds, of which launches are hidden by copies.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import cuda_memory
from benchmarks.peers.cases import Setup, workload_of
from benchmarks.peers.record import PeerRun, Timing, Traffic
from benchmarks.peers.vllm_plan import BLOCK_SIZE, PREFILL_TOKENS, cache_bytes, streamed_bytes
from hsrpc.model.shapes import SHAPES

_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one never asks for an offloader, without a word
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_OFFLOADER_LOGGER = "vllm.model_executor.offloader.prefetch"
_OFFLOADER_IS_ON = "[PrefetchOffloader] Initialized"
_DEVIATION = 0.02
_WARM_UP = (4, 4)
"""Requests, and new tokens of each."""


def run(setups: Sequence[Setup]) -> Iterator[PeerRun]:
    """Load once, warm up, and generate for each of the setups."""
    os.environ.update(_ENVIRONMENT)
    started = time.perf_counter()
    with _offloader_messages() as messages:
        llm = _load(setups)
    require_offloader(messages)
    loaded = time.perf_counter()
    _generate(llm, _prompts(setups[0], reverse=True)[: _WARM_UP[0]], _WARM_UP[1])
    for setup in setups:
        cuda_memory.reset_peak()
        timing = _generate(llm, _prompts(setup), setup.output)
        yield PeerRun(
            timing=timing,
            traffic=Traffic(batch=setup.batch or 0, context=setup.mean_context, weights=streamed_bytes(setup), cache=0),
            peak_device_bytes=cuda_memory.peak_bytes(),
            host_bytes=cuda_memory.pinned_by_torch(),
            load_seconds=loaded - started,
        )


def require_offloader(messages: Sequence[str]) -> None:
    """Refuse to measure where the offloader is not at work.

    Raises:
        ValueError: it did not say that it is.
    """
    if not any(message.startswith(_OFFLOADER_IS_ON) for message in messages):
        raise ValueError(f"vLLM did not say {_OFFLOADER_IS_ON!r}: its weights are not offloaded; use vllm==0.23.0")


def engine_arguments(setups: Sequence[Setup], model: Path) -> dict[str, Any]:
    """Settings of the engine that runs all these setups."""
    setup = setups[0]
    group, on_host, ahead = setup.offload
    drafts = {"method": "ngram", "num_speculative_tokens": setup.drafts, "prompt_lookup_max": 4}
    return {
        "model": str(model),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": setup.prompt + setup.output + BLOCK_SIZE,
        "max_num_seqs": max(each.batch or 0 for each in setups),
        "max_num_batched_tokens": PREFILL_TOKENS,
        "kv_cache_memory_bytes": cache_bytes(setup),
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "attention_backend": "FLASH_ATTN",
        "enforce_eager": True,
        "offload_backend": "prefetch",
        "offload_group_size": group,
        "offload_num_in_group": on_host,
        "offload_prefetch_step": ahead,
        "speculative_config": drafts if setup.drafts else None,
    }


def timed(engine: Any, output: int, clock: Any = time.perf_counter) -> Timing:
    """Run the engine until no request is left; its results have the new tokens alone.

    A step that gives some request its first token is one with prompts.

    Raises:
        ValueError: some request did not get `output` tokens, or all tokens are alike.
    """
    told: dict[str, list[int]] = {}
    prefill, steps, tokens, before = 0.0, [], 0, clock()
    while engine.has_unfinished_requests():
        made, begun = 0, False
        for result in engine.step():
            known, fresh = told.setdefault(result.request_id, []), result.outputs[0].token_ids
            begun |= not known
            made += len(fresh)
            known.extend(fresh)
        now = clock()
        if made and not begun:
            steps.append(now - before)
            tokens += made
        else:
            prefill += now - before
        before = now
    lengths, values = set(map(len, told.values())), {token for found in told.values() for token in found}
    if lengths != {output} or len(values) < 2:
        raise ValueError(f"new tokens {sorted(lengths)} where {output} were asked for, {len(values)} different ones")
    return Timing(prefill=prefill, steps=steps, tokens=tokens)


def _load(setups: Sequence[Setup]) -> Any:
    from vllm import LLM
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = _fill
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, setups[0].model)
        model.mkdir()
        config = SHAPES[setups[0].model] | {"dtype": "bfloat16", "eos_token_id": None}
        (model / "config.json").write_text(json.dumps(config))
        return LLM(**engine_arguments(setups, model), gpu_memory_utilization=_share(setups[0].budgets.device))


def _share(size: int) -> float:
    """Part of the device's memory, which vLLM wants to find free."""
    return size / torch.cuda.get_device_properties(0).total_memory


@torch.no_grad()
def _fill(loader: Any, model: torch.nn.Module, config: Any) -> None:
    """Stands for vLLM's filling of dummy weights: matrices from one random block, norms of 1."""
    parameters = list(model.parameters())
    largest = max(parameter.numel() for parameter in parameters)
    block = cuda_memory.random_on_gpu([largest], 0.0, _DEVIATION).bfloat16()
    for parameter in parameters:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(block[: parameter.numel()].view(parameter.shape))


def _prompts(setup: Setup, *, reverse: bool = False) -> list[list[int]]:
    prompts = [list(prompt) for prompt in workload_of(setup, setup.batch or 0).prompts]
    return [prompt[::-1] for prompt in prompts] if reverse else prompts


def _generate(llm: Any, prompts: Sequence[Sequence[int]], output: int) -> Timing:
    """From an empty prefix cache, as `LLM.generate` does it, with the time of each step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if not llm.reset_prefix_cache():
        raise ValueError("vLLM's prefix cache cannot be emptied: blocks of the run before are still in use")
    wanted = SamplingParams(
        max_tokens=output,
        ignore_eos=True,
        detokenize=False,
        temperature=0.0,
        output_kind=RequestOutputKind.DELTA,
    )
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, wanted)
    added = time.perf_counter() - started
    timing = timed(llm.llm_engine, output)
    return Timing(prefill=timing.prefill + added, steps=timing.steps, tokens=timing.tokens)


@contextmanager
def _offloader_messages() -> Iterator[list[str]]:
    """What vLLM's offloader logs meanwhile."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(logging.INFO), logging.getLogger(_OFFLOADER_LOGGER)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
