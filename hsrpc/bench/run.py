"""Runs a workload on an engine and says how close to the limit it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

from hsrpc.bench.lag import LoopLag
from hsrpc.bench.profile import StepProfile, StepProfiler, has_gpu
from hsrpc.bench.workload import Workload
from hsrpc.config import EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.engine.startup import ChoosePlan, measure_machine, measure_sustained_load
from hsrpc.engine.stats import EngineStats
from hsrpc.errors import HsrpcError
from hsrpc.model.family import ModelSpec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import Roofline, StepRecord, roofline
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import SamplingParams

WARM_UP_STEPS = 3
_CALIBRATIONS = 2
"""Calibrations after the run, beside the one before it: the bus of a shared machine varies."""


class BenchError(HsrpcError):
    """A measurement that would not mean what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was observed while the engine ran."""

    spec: ModelSpec
    plan: Plan
    device: str
    records: Sequence[StepRecord]
    chosen: Sequence[StepRecord]
    """Those to measure, after the warm-up."""
    stats: EngineStats
    seconds: float
    """Time from the first request to the end."""
    ready_seconds: float
    loop_lag_p99: float
    profile: StepProfile | None
    """Profile of the steps after the measured ones; None: none were profiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement, in seconds, bytes and tokens. Steps are the chosen ones, those after the warm-up."""

    model: str
    device: str
    policy: str
    activation_share: float
    resident_share: float
    codes_weights: bool
    """Those that stream cross the bus coded."""
    cache_format: str
    """How cached tokens are kept."""
    batch: int
    num_steps: int
    step_seconds: float
    """Median."""
    step_times: tuple[float, ...]
    limit_seconds: float
    """Median of the steps' limits."""
    limit: Roofline
    """Its terms, medians."""
    efficiency: float
    """Sum of the limits over the sum of the times."""
    sustained_efficiency: float
    """The same at the bandwidth that plain copies keep up after the run, whatever disturbs them."""
    sustained_bandwidth: float
    """Bytes/s."""
    predicted_step_seconds: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    total_tokens_per_second: float
    """Prompt and output tokens of the whole run, warm-up included."""
    prefill_gemm_share: float
    """FLOP of the products with weights over what the measured GEMM rate could have done in the steps' time."""
    bus_bytes_per_second: float
    device_busy_share: float | None
    """Part of a step's time in which the compute stream ran a kernel; None: not measured."""
    regenerated_tokens: int
    recomputed_tokens: int
    """Tokens recomputed because their requests keep no cache."""
    expert_hits: int
    """Experts on demand that were on the device when a step needed them, each layer counted."""
    expert_loads: int
    """Those that were not, and were loaded."""
    expert_loaded_bytes: int
    expert_hit_rate: float | None
    """None: experts do not come on demand."""
    expected_hit_rate: float | None
    """Where all are as likely: what the plan counts on."""
    predicted_at_hits_seconds: float | None
    """The predicted step, had as many experts been hits as were; None: experts do not come on demand."""
    preemptions: int
    peak_device_bytes: int
    device_budget: int
    pinned_bytes: int
    host_budget: int
    loop_lag_p99: float
    ready_seconds: float
    hardware: Hardware
    """Medians of the calibrations before and after."""
    profile: StepProfile | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


async def observe_run(
    config: EngineConfig,
    make: Callable[[Engine], Workload],
    choose: Callable[[Sequence[StepRecord]], Sequence[StepRecord]],
    *,
    is_enough: Callable[[StepRecord], bool] = lambda _: False,
    choose_plan: ChoosePlan = Planner.plan,
    with_busy: bool = False,
    with_ranges: bool = False,
    trace: Path | None = None,
) -> Run:
    """Run the workload that `make` gives for the engine until `is_enough` says so or its requests end.

    `choose` says which steps are measured, `choose_plan` makes the engine's plan. Steps like them are profiled
    afterwards, `with_busy` for the time in which a GPU is busy, and `with_ranges` for the parts of a step; where the
    requests have ended others like them run. What was profiled is saved as `trace`.
    """
    steps = _Steps(is_enough)
    started = time.perf_counter()
    async with Engine(config, observe=steps, choose_plan=choose_plan) as engine:
        ready = time.perf_counter()
        workload = make(engine)
        async with _load(engine, workload) as load:
            async with LoopLag() as lag:
                await _until(steps.enough, load)
            run = _observed(engine, steps, choose, lag, (started, ready))
            steps.profiler = profiler = _profiler_for(run, config, with_busy, with_ranges)
            if profiler is not None:
                await _until(steps.profiled, load)
        if profiler is not None and not profiler.is_done:  # the requests have ended: others like them
            async with _load(engine, workload.like_it()) as load:
                await _until(steps.profiled, load)
        if profiler is not None and profiler.is_done and trace is not None:
            profiler.save(trace)
        return replace(run, profile=profiler.result() if profiler else None)


def summarise(run: Run, config: EngineConfig) -> Result:
    """The result of the chosen steps of a run; calibrates the machine again.

    Raises:
        BenchError: no step was chosen, memory went over a budget, or weights that should stream did not.
    """
    _check(run)
    chosen, profile = run.chosen, run.profile
    hardware, sustained = _rates(run.plan, config)
    limits, kept_up = (
        [
            roofline(each, run.spec.sizes, rates, absorbs=run.plan.absorbs, gathered_bytes=run.plan.gathered_bytes)
            for each in chosen
        ]
        for rates in (hardware, sustained)
    )
    seconds = [record.seconds for record in chosen]
    total = sum(seconds)
    tokens = [record.decode_tokens + record.prefill_tokens for record in chosen]
    plan, stats, sizes = run.plan, run.stats, run.spec.sizes
    hits, loads = (sum(getattr(record, name) for record in chosen) for name in ("expert_hits", "expert_loads"))
    flop = sizes.num_layers * float(sizes.mean(lambda layer: layer.flop(sum(tokens))))
    hit_rate = hits / (hits + loads) if hits + loads else None
    return Result(
        model=run.spec.name,
        device=run.device,
        policy=plan.policy,
        activation_share=plan.activation_share,
        resident_share=plan.resident_share,
        codes_weights=plan.decode_buffer_bytes > 0,
        cache_format=plan.cache_format.value,
        batch=plan.max_batch,
        num_steps=len(chosen),
        step_seconds=median(seconds),
        step_times=tuple(seconds),
        limit_seconds=median(limit.seconds for limit in limits),
        limit=Roofline(*(median(getattr(limit, item.name) for limit in limits) for item in fields(Roofline))),
        efficiency=sum(limit.seconds for limit in limits) / total,
        sustained_efficiency=sum(limit.seconds for limit in kept_up) / total,
        sustained_bandwidth=sustained.load_bandwidth,
        predicted_step_seconds=plan.prediction.step,
        decode_tokens_per_second=sum(record.decode_tokens for record in chosen) / total,
        prefill_tokens_per_second=sum(record.prefill_tokens for record in chosen) / total,
        total_tokens_per_second=(stats.prompt_tokens + stats.generated_tokens) / run.seconds,
        prefill_gemm_share=flop / hardware.gemm_rate / total,
        bus_bytes_per_second=sum(record.weight_bytes + record.cache_bytes for record in chosen) / total,
        device_busy_share=profile.busy if profile else None,
        regenerated_tokens=sum(record.regenerated_tokens for record in chosen),
        recomputed_tokens=sum(record.recomputed_tokens for record in chosen),
        expert_hits=hits,
        expert_loads=loads,
        expert_loaded_bytes=loads * plan.demand.expert_bytes if plan.demand else 0,
        expert_hit_rate=hit_rate,
        expected_hit_rate=plan.demand.hit_rate if plan.demand else None,
        predicted_at_hits_seconds=None if hit_rate is None else _predicted_at(hit_rate, plan, sizes),
        preemptions=stats.preemptions,
        peak_device_bytes=stats.peak_device_bytes,
        device_budget=plan.budgets.device,
        pinned_bytes=sum(plan.host_bytes.values()),
        host_budget=plan.budgets.host,
        loop_lag_p99=run.loop_lag_p99,
        ready_seconds=run.ready_seconds,
        hardware=hardware,
        profile=profile,
    )


def _predicted_at(hit_rate: float, plan: Plan, sizes: ModelSizes) -> float:
    """Seconds of the step that the plan predicts, with that part of the experts on the device."""
    return predict_at(plan, sizes, plan.prediction.context, hit_rate=hit_rate).step


def _rates(plan: Plan, config: EngineConfig) -> tuple[Hardware, Hardware]:
    """The machine's, and those with what the bus keeps up. Of several GPUs those that all measured at once."""
    if plan.num_gpus > 1:
        return plan.hardware, plan.hardware
    again = (measure_machine(config).hardware for _ in range(_CALIBRATIONS))
    hardware = _median_hardware([plan.hardware, *again])
    return hardware, replace(hardware, load_bandwidth=measure_sustained_load(config))


class _Steps:
    """Takes the records of an engine's steps: keeps them until there are enough, then hands them to the profiler."""

    def __init__(self, is_enough: Callable[[StepRecord], bool]) -> None:
        self.records: list[StepRecord] = []
        self.enough = asyncio.Event()
        self.profiler: StepProfiler | None = None
        self.profiled = asyncio.Event()
        self._is_enough = is_enough

    def __call__(self, record: StepRecord) -> None:
        if not self.enough.is_set():
            self.records.append(record)
            if self._is_enough(record):
                self.enough.set()
        if self.profiler is not None:
            self.profiler(record)
            if self.profiler.is_done:
                self.profiled.set()


def _observed(
    engine: Engine,
    steps: _Steps,
    choose: Callable[[Sequence[StepRecord]], Sequence[StepRecord]],
    lag: LoopLag,
    times: tuple[float, float],
) -> Run:
    """All but the profile; `times` are those of the start and of being ready."""
    started, ready = times
    return Run(
        spec=engine.spec,
        plan=engine.plan,
        device=engine.device,
        records=tuple(steps.records),
        chosen=choose(steps.records)[WARM_UP_STEPS:],
        stats=engine.stats(),
        seconds=time.perf_counter() - ready,
        ready_seconds=ready - started,
        loop_lag_p99=lag.p99(),
        profile=None,
    )


def _profiler_for(run: Run, config: EngineConfig, with_busy: bool, with_ranges: bool) -> StepProfiler | None:
    """None where nothing is to be profiled; typical steps have the requests of the median of the chosen ones."""
    on_cuda = has_gpu(config.device)
    if not run.chosen or not ((with_busy and on_cuda) or with_ranges):
        return None
    num_requests = median(record.num_requests for record in run.chosen)
    prefill = max(record.prefill_tokens for record in run.chosen)

    def is_typical(record: StepRecord) -> bool:
        return record.num_requests >= num_requests and record.prefill_tokens <= prefill

    return StepProfiler(is_typical, on_cuda=on_cuda, ranges=with_ranges)


@asynccontextmanager
async def _load(engine: Engine, workload: Workload) -> AsyncIterator[asyncio.Task[None]]:
    """All requests of the workload; leaving ends those that still run."""
    load = asyncio.create_task(load_requests(engine, workload))
    try:
        yield load
    finally:
        load.cancel()
        await asyncio.wait({load})


async def _until(event: asyncio.Event, load: asyncio.Task[None]) -> None:
    """Wait for `event` or the end of `load`; raises what `load` raised."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({waiting, load}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if load.done():
        load.result()


async def load_requests(engine: Engine, workload: Workload) -> None:
    """All requests of the workload at once, to their ends; of several errors the first is raised, not their group."""
    try:
        async with asyncio.TaskGroup() as group:
            for prompt, count in zip(workload.prompts, workload.output_tokens, strict=True):
                group.create_task(_request(engine, prompt, count))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _request(engine: Engine, prompt: Sequence[int], count: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    async with aclosing(engine.generate(prompt, params)) as deltas:
        async for _ in deltas:
            pass


def _check(run: Run) -> None:
    plan, peak = run.plan, run.stats.peak_device_bytes
    if not run.chosen:
        raise BenchError("no step was left to measure after the warm-up; give more requests or more output tokens")
    if peak > plan.budgets.device:
        raise BenchError(f"the allocator's peak of {peak} bytes is over the device budget of {plan.budgets.device}")
    if sum(layer.bus_bytes for layer in plan.placed) and not sum(record.weight_bytes for record in run.chosen):
        raise BenchError("weights were to stream and did not")


def _median_hardware(found: Sequence[Hardware]) -> Hardware:
    return Hardware(**{item.name: median(getattr(h, item.name) for h in found) for item in fields(Hardware)})
