"""The table of cases."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path

from hsrpc.bench.workload import Lengths
from hsrpc.config import (
    CacheCoding,
    CachePolicy,
    DeviceKind,
    DType,
    EngineConfig,
    ExpertLoading,
    Placement,
    WeightCoding,
)
from hsrpc.model.random_codes import split_format
from hsrpc.model.shapes import RANDOM_PREFIX, SHAPES

_TINY = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "ffn_dim": 256,
    "intermediate_size": 256,
    "vocab_size": 100,
    "eos_token_id": 2,
}
"""What a tiny model has in place of its shape's own values."""


class Kind(StrEnum):
    """Which steps are measured."""

    DECODE = "decode"
    """Steps in which the whole batch decodes, with no prompt beside."""
    PREFILL = "prefill"
    """Steps that compute prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement: an engine, and a batch of requests for it."""

    name: str
    shows: str
    """Which part of the data path it would show to be slower."""
    config: EngineConfig
    """Config without lengths, which follow from the case's own: see `engine_config`."""
    kind: Kind = Kind.DECODE
    prompt: int
    """Tokens of each prompt, or their mean where `lengths` are not uniform."""
    output: int = 1
    """Tokens that each request generates at most; what is not needed for the steps is not generated."""
    lengths: Lengths = Lengths.UNIFORM
    """How the lengths of the prompts are distributed."""
    steps: int
    """Steps that are measured, after the warm-up."""
    runs_graphs: bool = False
    """The time of its steps' graphs alone is measured as well, from which the host's part follows."""

    @property
    def longest(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self.prompt * (1 if self.lengths is Lengths.UNIFORM else 4) + self.output

    @property
    def engine_config(self) -> EngineConfig:
        """Config with the case's lengths; requests that are to decode are expected to do nothing else."""
        context = self.prompt + self.output // 2
        return replace(
            self.config,
            max_model_len=self.longest,
            expected_context=context,
            expected_output=2 * context if self.kind is Kind.DECODE else None,
        )

    @property
    def setting(self) -> dict[str, object]:
        """All that the result depends on; by it two results can be compared. What has its default is left out."""
        config = self.engine_config
        given = {item.name: getattr(config, item.name) for item in fields(config)}
        given["model"] = Path(config.model).name  # wherever a tiny model's configuration lies
        return {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)} | {
            "kind": self.kind,
            "prompt": self.prompt,
            "output": self.output,
            "lengths": self.lengths,
            "steps": self.steps,
        }


_DEFAULTS = EngineConfig()
_OPT_6_7B = EngineConfig(
    model=RANDOM_PREFIX + "opt-6.7b",
    device=DeviceKind.CUDA,
    dtype=DType.FLOAT16,
    placement=Placement.HOST,
    gpu_memory="24GiB",
    host_memory="60GiB",
)

# Pinning host memory takes more time than all else: no case has more of it than its requests need.
CASES = (
    Case(
        name="host-kv",
        shows="weights and K/V blocks from the host, bound by the bus",
        config=replace(_OPT_6_7B, cache_policy=CachePolicy.KV, min_batch=96, max_batch=96),
        prompt=660,
        output=40,
        steps=5,
    ),
    Case(
        name="host-auto",
        shows="the same with activations, K and V rebuilt from them on the GPU",
        config=replace(_OPT_6_7B, cache_policy=CachePolicy.AUTO, min_batch=96, max_batch=96),
        prompt=660,
        output=40,
        steps=6,
    ),
    Case(
        name="planned-24gib",
        shows="the planner's own batch: weights in part on the device, caches on both sides",
        config=EngineConfig(
            model=RANDOM_PREFIX + "opt-13b",
            device=DeviceKind.CUDA,
            dtype=DType.FLOAT16,
            gpu_memory="24GiB",
            host_memory="24GiB",
        ),
        prompt=512,
        output=64,
        steps=6,
    ),
    Case(
        name="fp8-caches",
        shows="activations in 8 bits: stored, and multiplied as codes to rebuild K and V",
        config=EngineConfig(
            model=RANDOM_PREFIX + "opt-13b",
            device=DeviceKind.CUDA,
            dtype=DType.FLOAT16,
            cache_format=CacheCoding.FP8,
            gpu_memory="24GiB",
            host_memory="14GiB",
            min_batch=96,
            max_batch=96,
        ),
        prompt=512,
        output=40,
        steps=5,
    ),
    Case(
        name="quantised",
        shows="weights of 4 bits in part on the device, packed, all decoded by one launch a layer",
        config=EngineConfig(
            model=RANDOM_PREFIX + "qwen3-32b:w4a16",
            device=DeviceKind.CUDA,
            dtype=DType.BFLOAT16,
            cache_policy=CachePolicy.KV,
            gpu_memory="12GiB",
            host_memory="12GiB",
            min_batch=32,
            max_batch=32,
        ),
        prompt=256,
        output=24,
        steps=6,
    ),
    Case(
        name="coded-mixed",
        shows="coded bfloat16 weights decoded on the GPU, rotary positions, requests of mixed lengths",
        config=EngineConfig(
            model=RANDOM_PREFIX + "llama-2-13b",
            device=DeviceKind.CUDA,
            dtype=DType.BFLOAT16,
            placement=Placement.HOST,
            weight_coding=WeightCoding.LOSSLESS,
            gpu_memory="24GiB",
            host_memory="26GiB",
            min_batch=48,
            max_batch=48,
        ),
        prompt=400,
        output=40,
        lengths=Lengths.SHAREGPT_LIKE,
        steps=6,
    ),
    Case(
        name="mixture",
        shows="coded experts, all of which stream, decoded by one launch a layer",
        config=EngineConfig(
            model=RANDOM_PREFIX + "olmoe",
            device=DeviceKind.CUDA,
            dtype=DType.BFLOAT16,
            placement=Placement.HOST,
            cache_policy=CachePolicy.KV,
            weight_coding=WeightCoding.LOSSLESS,
            recompute_share=0.0,
            experts=ExpertLoading.STREAM,
            gpu_memory="24GiB",
            host_memory="20GiB",
            min_batch=64,
            max_batch=64,
        ),
        prompt=512,
        output=40,
        steps=6,
    ),
    Case(
        name="resident",
        shows="a model all on the device, its steps as graphs: what the host adds to them",
        config=EngineConfig(
            model=RANDOM_PREFIX + "opt-1.3b",
            device=DeviceKind.CUDA,
            dtype=DType.FLOAT16,
            gpu_memory="24GiB",
            host_memory="4GiB",
            min_batch=162,
            max_batch=162,
        ),
        prompt=512,
        output=96,
        steps=40,
        runs_graphs=True,
    ),
    Case(
        name="prompts",
        shows="prompts while weights stream, and their caches' way to the host",
        config=replace(_OPT_6_7B, min_batch=8, max_batch=8),
        kind=Kind.PREFILL,
        prompt=2047,
        steps=8,
    ),
)


def tiny(case: Case, directory: Path) -> Case:
    """The case on the CPU with a model of two layers, whose configuration is written into `directory`.

    It takes the same paths; its figures mean nothing.
    """
    name, form = split_format(case.config.model.removeprefix(RANDOM_PREFIX))
    shape = SHAPES[name]
    file = directory / f"{case.name}.json"
    file.write_text(json.dumps(shape | {name: value for name, value in _TINY.items() if name in shape}))
    is_coded = case.config.weight_coding is WeightCoding.LOSSLESS
    config = replace(
        case.config,
        model=f"{RANDOM_PREFIX}{file}" + ("" if form is None else f":{form.name}"),
        device=DeviceKind.CPU,
        dtype=case.config.dtype if is_coded else DType.FLOAT32,
        gpu_memory="64MiB",
        host_memory="64MiB",
        min_batch=3,
        max_batch=3,
    )
    return replace(case, config=config, prompt=8, output=min(case.output, 24), steps=5)
