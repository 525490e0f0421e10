"""hsrpc by way of its own benchmark: one batch of requests that arrive at once, from the first to the last token."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.cases import Case, Setup, workload_of
from benchmarks.peers.record import Outcome
from hsrpc.bench.run import Result, Run, observe_run, summarise
from hsrpc.bench.workload import Workload
from hsrpc.cli.loop import run_loop
from hsrpc.config import CachePolicy, EngineConfig, Placement
from hsrpc.engine.engine import Engine
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.roofline import StepRecord


def run(setup: Setup) -> Outcome:
    """Load, serve one batch, and compare its decode steps with their limits.

    Raises:
        ValueError: the case wants all on the device, and something was copied there in the steps.
    """
    config = engine_config(setup)
    batch = 0

    def make(engine: Engine) -> Workload:
        nonlocal batch
        batch = setup.batch or engine.plan.max_batch
        return workload_of(setup, batch)

    observed = run_loop(observe_run(config, make, lambda records: decode_steps(batch, records)))
    result = summarise(observed, config)
    if setup.case is Case.RESIDENT and result.bus_bytes_per_second:
        raise ValueError(
            f"batch {batch} is not all on the device, with {config.gpu_memory} bytes; give --gpu-memory more"
        )
    return outcome_of(setup, observed, result, batch)


def engine_config(setup: Setup) -> EngineConfig:
    """The engine's settings for a setup."""
    return EngineConfig(
        model=RANDOM_PREFIX + setup.model,
        gpu_memory=setup.budgets.device,
        host_memory=setup.budgets.host,
        cache_policy=CachePolicy(setup.policy),
        placement=Placement.HOST if setup.case in (Case.HOST, Case.ALONE) else Placement.AUTO,
        min_batch=setup.batch or 1,
        max_batch=setup.batch,
        max_model_len=setup.prompt + setup.output,
        expected_context=setup.prompt + setup.output,  # all requests grow together: what the last steps hold
        expected_shared_prefix=setup.shared,
    )


def decode_steps(batch: int, records: Sequence[StepRecord]) -> list[StepRecord]:
    """Steps of the whole batch without prompts beside; where blocks never sufficed for that, all without prompts."""
    decoding = [record for record in records if record.decode_tokens and not record.prefill_tokens]
    full = [record for record in decoding if record.decode_tokens == batch]
    return full or decoding


def outcome_of(setup: Setup, observed: Run, result: Result, batch: int) -> Outcome:
    """The engine's own figures under the names that all systems share."""
    first_decode = next(i for i, record in enumerate(observed.records) if not record.prefill_tokens)
    decode_seconds = sum(record.seconds for record in observed.records[first_decode:])
    total_tokens = batch * setup.output
    return Outcome(
        device=result.device,
        batch=batch,
        prefill_seconds=observed.seconds - decode_seconds,
        step_seconds=result.step_seconds,
        decode_seconds=decode_seconds,
        total_seconds=observed.seconds,
        decode_tokens=sum(record.decode_tokens for record in observed.records[first_decode:]),
        total_tokens=total_tokens,
        projected=False,
        limit_step_seconds=result.limit_seconds,
        efficiency=result.efficiency,
        peak_device_bytes=result.peak_device_bytes,
        host_bytes=result.pinned_bytes,
        load_seconds=result.ready_seconds,
        load_bandwidth=result.hardware.load_bandwidth,
    )
