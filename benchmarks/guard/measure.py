"""One case, measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

from benchmarks.decoding import Cell, cell_of, check_steps, observe_decoding
from benchmarks.guard.cases import Case, Kind
from benchmarks.orchestration import decode_graphs, time_alone
from hsrpc.bench.run import WARM_UP_STEPS, Result, Run, observe_run, summarise
from hsrpc.bench.workload import Workload, make_workload
from hsrpc.engine.engine import Engine
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord

_CASE_SECONDS = 90.0
"""A case that takes longer has failed."""


async def measure(case: Case) -> Cell:
    """What the file has of a case: its figures, in seconds, bytes and tokens, or its `failure`."""
    started = time.perf_counter()
    cell = {"name": case.name, "shows": case.shows, "setting": case.setting}
    cell |= await cell_of(_measure(case), _CASE_SECONDS)
    return cell | {"wall_seconds": time.perf_counter() - started}


async def _measure(case: Case) -> Cell:
    config, alone = case.engine_config, None

    def time_graphs(engine: Engine) -> None:
        nonlocal alone
        alone = time_alone(engine, decode_graphs(engine), engine.plan.max_batch, case.prompt + case.steps // 2)

    if case.kind is Kind.PREFILL:
        run = await _observe_prompts(case)
    else:
        run = await observe_decoding(
            config,
            prompt=case.prompt,
            output=case.output,
            steps=case.steps,
            lengths=case.lengths,
            prepare=time_graphs if case.runs_graphs else None,
        )
    check_steps(run)
    return _figures(case, run, summarise(run, config), alone)


async def _observe_prompts(case: Case) -> Run:
    """Run the steps of prompts that the case measures, without those in which a request decodes."""
    num_steps = 0

    def has_prompts(record: StepRecord) -> bool:
        return record.prefill_tokens > 0 and record.decode_tokens == 0

    def is_enough(record: StepRecord) -> bool:
        nonlocal num_steps
        num_steps += has_prompts(record)
        return num_steps >= case.steps + WARM_UP_STEPS

    def make(engine: Engine) -> Workload:
        tokens = (case.steps + WARM_UP_STEPS + 1) * engine.plan.max_idle_prefill_tokens
        lengths = {"prompt": case.prompt, "output": case.output, "vocab_size": engine.spec.vocab_size}
        return make_workload(case.lengths, count=-(-tokens // case.prompt), **lengths)

    def choose(records: Sequence[StepRecord]) -> list[StepRecord]:
        return list(filter(has_prompts, records))

    return await observe_run(case.engine_config, make, choose, is_enough=is_enough)


def _figures(case: Case, run: Run, result: Result, alone: float | None) -> Cell:
    """`alone`: seconds of a step's graph and sampling; the host's part is what a step takes beyond."""
    predicted = None
    if case.kind is Kind.DECODE:  # predictions are of decode steps
        context = round(fmean(record.held_tokens for record in run.chosen) / result.batch)
        predicted = predict_at(run.plan, run.spec.sizes, context).step
        tokens = result.decode_tokens_per_second
    else:
        tokens = result.prefill_tokens_per_second
    return {
        "device": result.device,
        "policy": result.policy,
        "batch": result.batch,
        "activation_share": result.activation_share,
        "resident_share": result.resident_share,
        "codes_weights": result.codes_weights,
        "num_steps": result.num_steps,
        "step_seconds": result.step_seconds,
        "step_times": result.step_times,
        "limit_seconds": result.limit_seconds,
        "limit": asdict(result.limit),
        "efficiency": result.efficiency,
        "predicted_step_seconds": predicted,
        "tokens_per_second": tokens,
        "host_step_seconds": None if alone is None else result.step_seconds - alone,
        "loop_lag_p99": result.loop_lag_p99,
        "preemptions": result.preemptions,
        "pinned_bytes": result.pinned_bytes,
        "ready_seconds": result.ready_seconds,
        "hardware": asdict(result.hardware),
    }
