"""Plans and predictions of well-known models in words, to be compared with those written down in plans.txt.

`python -m tests.plan.plans > tests/plan/plans.txt` writes them anew: only where they are meant to change.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple
from itertools import groupby
from typing import NamedTuple

import torch

from hsrpc.config import EngineConfig, WeightCoding
from hsrpc.errors import ConfigError
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.choice import uniform, with_scaled
from hsrpc.model.formats.lossless import Lossless
from hsrpc.model.formats.plain import Plain
from hsrpc.model.random_codes import RANDOM_FORMATS
from hsrpc.model.spec import in_formats, named_spec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets, Plan, StepPrediction
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.sizes import ModelSizes

GIB = 2**30
HARDWARE = Hardware(
    load_bandwidth=54.6e9,
    store_bandwidth=55.2e9,
    contended_share=0.93,
    gemm_rate=702e12,
    memory_bandwidth=2.81e12,
    duplex_share=0.81,
    prompt_rate_share=0.9,
    gemm_overhead=6.3e-6,
    weight_read_share=0.87,
    attention_read_share=0.95,
    small_kernel_time=2.7e-6,
    launch_time=3.1e-4,
    prompt_launch_time=9.3e-4,
    hop_time=2.5e-4,
    handover_time=0.8e-4,
    boundary_time=1e-3,
    request_time=2e-5,
)
"""Rates as calibration finds them on an H100, none of them left out."""


class Case(NamedTuple):
    """A model, a machine's memory in GiB, and settings."""

    shape: str
    device: float
    host: float
    settings: dict[str, object]
    dtype: torch.dtype | None = None
    coded: bool = False
    """Weights are coded without loss."""
    quantised: str = ""
    """Format of weights that are quantised: see `RANDOM_FORMATS`."""


CASES = {
    "opt-125m, resident": Case("opt-125m", 4, 16, {}),
    "opt-1.3b, kv": Case("opt-1.3b", 24, 90, {"cache_policy": "kv", "expected_context": 576, "expected_output": 128}),
    "opt-1.3b, float32 on the host": Case("opt-1.3b", 4, 40, {"placement": "host"}, torch.float32),
    "opt-6.7b, activation": Case("opt-6.7b", 10, 60, {"cache_policy": "activation", "max_batch": 96}),
    "opt-6.7b, recompute": Case("opt-6.7b", 12, 60, {"cache_policy": "recompute", "max_model_len": 512}),
    "opt-6.7b, bounded steps": Case("opt-6.7b", 24, 90, {"max_step_time": 0.2, "expected_output": 256}),
    "opt-13b, auto": Case("opt-13b", 24, 100, {"expected_context": 576, "expected_output": 128}),
    "opt-13b, auto, coded": Case("opt-13b", 24, 100, {"expected_context": 576, "expected_output": 128}, coded=True),
    "opt-30b, auto": Case("opt-30b", 24, 100, {}),
    "opt-30b, on the host, coded": Case("opt-30b", 24, 100, {"placement": "host", "max_batch": 64}, coded=True),
    "opt-30b, a share": Case("opt-30b", 40, 100, {"cache_policy": "hybrid", "activation_share": 0.6}),
    "opt-30b, recomputed in part": Case("opt-30b", 24, 100, {"recompute_share": 0.25, "max_batch": 40}),
    "llama-2-13b, auto, coded": Case("llama-2-13b", 16, 60, {"expected_context": 700}, torch.bfloat16, coded=True),
    "llama-3-8b, partly resident": Case("llama-3-8b", 12, 40, {"resident_share": 0.4}),
    "mistral-7b, in the window": Case("mistral-7b", 12, 64, {"max_model_len": 8192, "expected_context": 6000}),
    "mistral-7b, activations, coded": Case(
        "mistral-7b", 20, 64, {"cache_policy": "activation", "expected_context": 5000}, torch.bfloat16, coded=True
    ),
    "qwen3-30b-a3b, partly resident": Case("qwen3-30b-a3b", 24, 80, {"expected_context": 700}, coded=True),
    "mixtral-8x7b, activations": Case("mixtral-8x7b", 40, 120, {"cache_policy": "activation"}),
    "llama-3.3-70b, fp8, packed": Case("llama-3.3-70b", 80, 110, {"max_batch": 32}, quantised="fp8"),
    "qwen3-32b, fp8, packed in part": Case("qwen3-32b", 48, 110, {"max_batch": 8}, quantised="fp8"),
    "gpt-oss-120b, mxfp4, packed": Case("gpt-oss-120b", 80, 110, {"max_batch": 4}, quantised="mxfp4"),
    "gpt-oss-120b, mxfp4, on demand": Case("gpt-oss-120b", 40, 110, {"max_batch": 1}, quantised="mxfp4"),
    "opt-66b, too small": Case("opt-66b", 8, 20, {}),
}


def sizes_of(case: Case) -> ModelSizes:
    """The model's sizes with the formats of the case."""
    spec = named_spec(case.shape, case.dtype)
    formats = uniform(Lossless(spec.dtype) if case.coded else Plain(spec.dtype), spec.dtype)
    if case.quantised:
        scaled = RANDOM_FORMATS[case.quantised].formats(create_family(spec))
        [formats] = with_scaled([formats], scaled, WeightCoding.AUTO)
    return in_formats(spec, formats).sizes


def describe(case: Case, digits: int = 9) -> str:
    """The plan, line by line; numbers that are not whole with as many significant `digits`."""
    sizes = sizes_of(case)
    budgets = Budgets(device=int(case.device * GIB), host=int(case.host * GIB), runtime=384 * 2**20)
    try:
        plan = Planner(sizes, budgets, HARDWARE, EngineConfig(**case.settings)).plan()
    except ConfigError as error:
        return f"refused: {error}\n"
    return "".join(f"{name}: {_text(value, digits)}\n" for name, value in _facts(plan, sizes))


def _facts(plan: Plan, sizes: ModelSizes) -> Iterator[tuple[str, object]]:
    yield "policy", plan.policy.value
    yield "reason", plan.reason
    yield "activation share", plan.activation_share
    yield "batch, longest", (plan.max_batch, plan.max_model_len)
    yield "prompt tokens", (plan.max_prefill_tokens, plan.spare_prefill_tokens, plan.max_idle_prefill_tokens)
    yield "recompute", astuple(plan.recompute)
    yield "buffers", astuple(plan.buffers)
    yield "costs", astuple(plan.costs)
    yield "streamed", _runs(_streamed(plan, sizes))
    if plan.kept_bytes:
        yield "packed", tuple(_counted(sorted(name for stays in plan.resident for name in stays.packed)))
    if plan.demand is not None:
        yield "on demand", (plan.demand.slots, plan.demand.expert_bytes, plan.demand.decoded_bytes)
    yield "blocks", {pool.name.lower(): count for pool, count in plan.num_blocks.items()}
    yield "device", {use.value: size for use, size in plan.device_bytes.items()}
    yield "host", {use.value: size for use, size in plan.host_bytes.items()}
    yield "step", _parts(plan.prediction)
    yield "step at 300 tokens", _parts(predict_at(plan, sizes, 300))
    record = StepRecord(
        seconds=1.0,
        num_requests=40,
        decode_tokens=37,
        prefill_tokens=411,
        recomputed_tokens=120,
        context_tokens=37_211,
        weight_bytes=sum(plan.streamed_bytes),
        cache_bytes=1_234_567_890,
        regenerated_tokens=123_456,
    )
    yield "roofline", astuple(roofline(record, sizes, plan.hardware))[:4]


def _parts(step: StepPrediction) -> dict[str, float]:
    """All of a step's, time for experts and from other GPUs where it takes any, and drafts where there are some."""
    hidden = {"experts": 0, "peers": 0} | ({} if step.drafts else {"drafts": 0, "tokens_per_request": 1.0})
    return {name: value for name, value in asdict(step).items() if value != hidden.get(name)}


def _streamed(plan: Plan, sizes: ModelSizes) -> Iterator[str]:
    """For each layer, what does not stay on the device, and the bytes that this takes before it is coded."""
    for layer, stays, placed in zip(sizes.layers, plan.resident, plan.placed, strict=True):
        yield f"{' '.join(_counted(sorted(layer.names - stays.names)))} {placed.streamed_bytes}"


def _counted(names: Iterable[str]) -> Iterator[str]:
    """Names, those of experts once, with how many there are."""
    alike = Counter(re.sub(r"(?<=expert_)\d+", "N", name) for name in names)
    return (name if count == 1 else f"{count} {name}" for name, count in alike.items())


def _runs(values: Iterable[object]) -> str:
    """Equal neighbours once, with their number."""
    runs = ((value, len(list(run))) for value, run in groupby(values))
    return "; ".join(f"{count} x {value}" for value, count in runs)


def _text(value: object, digits: int) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each, digits)}" for name, each in value.items())
    if isinstance(value, tuple):
        return ", ".join(_text(each, digits) for each in value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def all_plans(digits: int = 9) -> str:
    """Every case."""
    return "\n".join(f"[{name}]\n{describe(case, digits)}" for name, case in CASES.items())


if __name__ == "__main__":
    sys.stdout.write(all_plans(int(sys.argv[1]) if len(sys.argv) > 1 else 9))
