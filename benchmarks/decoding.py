"""Decode steps of a whole batch, which several benchmarks measure, and what is told of those that cannot be had."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeAlias

from hsrpc.bench.run import WARM_UP_STEPS, BenchError, Run, observe_run
from hsrpc.bench.workload import Lengths, Workload, make_workload
from hsrpc.config import EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.engine.startup import ChoosePlan
from hsrpc.errors import HsrpcError
from hsrpc.plan.planner import Planner
from hsrpc.plan.roofline import StepRecord

MIN_STEPS = 5
"""Steps that count as a measurement, at least."""
Cell: TypeAlias = dict[str, Any]
"""What a file has of one measurement, or its `failure`."""


async def cell_of(measuring: Awaitable[Cell], seconds: float) -> Cell:
    """What is measured within `seconds`, or why it is not: that leaves the other cells as they are."""
    try:
        async with asyncio.timeout(seconds):
            return await measuring
    except TimeoutError:
        return {"failure": f"took more than {seconds:g} s"}
    except HsrpcError as error:
        return {"failure": str(error)}
    except Exception as error:  # such as memory that the device does not have: the other cells may do
        traceback.print_exc()
        return {"failure": f"{type(error).__name__}: {error}"}


async def observe_decoding(
    config: EngineConfig,
    *,
    prompt: int,
    output: int,
    steps: int,
    lengths: Lengths = Lengths.UNIFORM,
    prepare: Callable[[Engine], None] | None = None,
    choose_plan: ChoosePlan = Planner.plan,
) -> Run:
    """At least `steps` steps, as far as the output goes, in which `max_batch` requests, or as many as planned, decode.

    `lengths` are those of the prompts, whose mean is `prompt`; all requests generate `output` tokens. `prepare` is
    called with the idle engine before they run; `choose_plan` makes the engine's plan.

    Raises:
        BenchError: so many do not fit at once.
    """
    batch = num_whole = 0

    def is_whole(record: StepRecord) -> bool:
        return record.prefill_tokens == 0 and record.decode_tokens == batch

    def is_enough(record: StepRecord) -> bool:
        nonlocal num_whole
        num_whole += is_whole(record)
        return num_whole >= steps + WARM_UP_STEPS

    def make(engine: Engine) -> Workload:
        nonlocal batch
        planned = engine.plan.max_batch
        batch = config.max_batch or planned
        if planned < batch:  # no step would be whole
            fitting = f"{planned} of {batch} requests fit at once"
            raise BenchError(f"{fitting}; raise gpu_memory or host_memory, or lower the batch")
        if prepare is not None:
            prepare(engine)
        sizes = {"prompt": prompt, "output": output, "vocab_size": engine.spec.vocab_size}
        return replace(make_workload(lengths, count=batch, **sizes), output_tokens=[output] * batch)

    return await observe_run(
        config,
        make,
        lambda records: list(filter(is_whole, records)),
        is_enough=is_enough,
        choose_plan=choose_plan,
    )


def check_steps(run: Run) -> None:
    """
    Raises:
        BenchError: the run has too few whole steps.
    """
    if len(run.chosen) < MIN_STEPS:
        found = f"{len(run.chosen)} whole steps of a batch of {run.plan.max_batch} are fewer than {MIN_STEPS}"
        raise BenchError(f"{found}; raise the steps, and the output")
