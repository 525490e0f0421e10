"""Runs a workload on an engine and says how close to the limit it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from statistics import median

from hsrpc.bench.lag import LoopLag
from hsrpc.bench.workload import Workload
from hsrpc.config import EngineConfig
from hsrpc.core.plan import Hardware, Plan
from hsrpc.core.request import SamplingParams
from hsrpc.engine.engine import Engine
from hsrpc.engine.limit import StepLimit, step_limit
from hsrpc.engine.startup import measure_hardware
from hsrpc.engine.stats import EngineStats, StepRecord
from hsrpc.errors import HsrpcError
from hsrpc.model.family import ModelSpec

WARM_UP_STEPS = 3
_CALIBRATIONS = 2
"""After the run, beside the one before it: the bus of a shared machine varies."""


class BenchError(HsrpcError):
    """A measurement that would not mean what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was observed while the engine ran."""

    spec: ModelSpec
    plan: Plan
    device: str
    records: Sequence[StepRecord]
    stats: EngineStats
    seconds: float
    """From the first request to the end."""
    ready_seconds: float
    loop_lag_p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement, in seconds, bytes and tokens. Steps are the chosen ones, those after the warm-up."""

    model: str
    device: str
    policy: str
    activation_share: float
    resident_share: float
    batch: int
    num_steps: int
    step_seconds: float
    """Median."""
    step_range: tuple[float, float]
    limit_seconds: float
    """Median of the steps' limits."""
    limit: StepLimit
    """Its terms, medians."""
    efficiency: float
    """Sum of the limits over the sum of the times."""
    predicted_step_seconds: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    total_tokens_per_second: float
    """Prompt and output tokens of the whole run, warm-up included."""
    prefill_gemm_share: float
    """FLOP of the products with weights over what the measured GEMM rate could have done in the steps' time."""
    bus_bytes_per_second: float
    regenerated_tokens: int
    preemptions: int
    peak_device_bytes: int
    device_budget: int
    pinned_bytes: int
    host_budget: int
    loop_lag_p99: float
    ready_seconds: float
    hardware: Hardware
    """Medians of the calibrations before and after."""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


async def observe_run(
    config: EngineConfig, make: Callable[[int], Workload], is_enough: Callable[[StepRecord], bool]
) -> Run:
    """Run the workload that `make` gives for the model's vocabulary until `is_enough` says so or its requests end."""
    records: list[StepRecord] = []
    enough = asyncio.Event()

    def observe(record: StepRecord) -> None:
        records.append(record)
        if is_enough(record):
            enough.set()

    started = time.perf_counter()
    async with Engine(config, observe=observe) as engine, LoopLag() as lag:
        ready = time.perf_counter()
        await _generate(engine, make(engine.spec.vocab_size), enough)
        return Run(
            spec=engine.spec,
            plan=engine.plan,
            device=engine.device,
            records=records,
            stats=engine.stats(),
            seconds=time.perf_counter() - ready,
            ready_seconds=ready - started,
            loop_lag_p99=lag.p99(),
        )


def summarise(run: Run, config: EngineConfig, chosen: Sequence[StepRecord]) -> Result:
    """The result of the `chosen` steps of a run; calibrates the machine again.

    Raises:
        BenchError: no step was chosen, memory went over a budget, or weights that should stream did not.
    """
    chosen = chosen[WARM_UP_STEPS:]
    _check(run, chosen)
    hardware = _median_hardware([run.plan.hardware, *(measure_hardware(config) for _ in range(_CALIBRATIONS))])
    limits = [step_limit(record, run.spec.sizes, hardware) for record in chosen]
    seconds = [record.seconds for record in chosen]
    total = sum(seconds)
    tokens = [record.decode_tokens + record.prefill_tokens for record in chosen]
    plan, stats, sizes = run.plan, run.stats, run.spec.sizes
    return Result(
        model=run.spec.name,
        device=run.device,
        policy=plan.policy,
        activation_share=plan.activation_share,
        resident_share=plan.resident_share,
        batch=plan.max_batch,
        num_steps=len(chosen),
        step_seconds=median(seconds),
        step_range=(min(seconds), max(seconds)),
        limit_seconds=median(limit.seconds for limit in limits),
        limit=StepLimit(*(median(getattr(limit, item.name) for limit in limits) for item in fields(StepLimit))),
        efficiency=sum(limit.seconds for limit in limits) / total,
        predicted_step_seconds=plan.prediction.step,
        decode_tokens_per_second=sum(record.decode_tokens for record in chosen) / total,
        prefill_tokens_per_second=sum(record.prefill_tokens for record in chosen) / total,
        total_tokens_per_second=(stats.prompt_tokens + stats.generated_tokens) / run.seconds,
        prefill_gemm_share=sum(tokens) * sizes.num_layers * sizes.layer_flop / hardware.gemm_rate / total,
        bus_bytes_per_second=sum(record.weight_bytes + record.cache_bytes for record in chosen) / total,
        regenerated_tokens=sum(record.regenerated_tokens for record in chosen),
        preemptions=stats.preemptions,
        peak_device_bytes=stats.peak_device_bytes,
        device_budget=plan.budgets.device,
        pinned_bytes=sum(plan.host_bytes.values()),
        host_budget=plan.budgets.host,
        loop_lag_p99=run.loop_lag_p99,
        ready_seconds=run.ready_seconds,
        hardware=hardware,
    )


async def _generate(engine: Engine, workload: Workload, enough: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        for prompt, count in zip(workload.prompts, workload.output_tokens, strict=True):
            group.create_task(_request(engine, prompt, count, enough))


async def _request(engine: Engine, prompt: Sequence[int], count: int, enough: asyncio.Event) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    async with aclosing(engine.generate(prompt, params)) as deltas:
        async for _ in deltas:
            if enough.is_set():
                break


def _check(run: Run, chosen: Sequence[StepRecord]) -> None:
    plan, peak = run.plan, run.stats.peak_device_bytes
    if not chosen:
        raise BenchError("no step was left to measure after the warm-up; give more requests or more output tokens")
    if peak > plan.budgets.device:
        raise BenchError(f"the allocator's peak of {peak} bytes is over the device budget of {plan.budgets.device}")
    if sum(plan.streamed_bytes) and not sum(record.weight_bytes for record in chosen):
        raise BenchError("weights were to stream and did not")


def _median_hardware(found: Sequence[Hardware]) -> Hardware:
    return Hardware(**{item.name: median(getattr(h, item.name) for h in found) for item in fields(Hardware)})
