"""Decode steps of one whole batch under one policy."""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass
from typing import Any

from benchmarks.policies.emulate import Policy, emulated
from hsrpc.bench.run import WARM_UP_STEPS, BenchError, Run, observe_run, summarise
from hsrpc.bench.workload import Lengths, Workload, make_workload
from hsrpc.config import DeviceKind, DType, EngineConfig, Placement
from hsrpc.core.plan import Plan
from hsrpc.engine.engine import Engine
from hsrpc.engine.startup import RANDOM_PREFIX
from hsrpc.engine.stats import StepRecord
from hsrpc.errors import HsrpcError

FEWEST_STEPS = 5
Cell = dict[str, Any]
"""What the file has of a policy: its name, and what was measured of it or its `failure`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all policies have in common: model, budgets, lengths."""

    shape: str
    dtype: str
    batch: int
    prompt: int
    output: int
    steps: int
    device: str
    gpu_memory: int
    host_memory: int
    hidden_layers: int | None
    """In place of HCache's rule."""

    def config(self, policy: Policy) -> EngineConfig:
        """Everything on the host, for requests that only decode: prompts are not what is measured."""
        context = self.prompt + self.output // 2
        return EngineConfig(
            model=RANDOM_PREFIX + self.shape,
            device=DeviceKind(self.device),
            dtype=DType(self.dtype),
            placement=Placement.HOST,
            cache_policy=policy.cache_policy,
            gpu_memory=self.gpu_memory,
            host_memory=self.host_memory,
            max_batch=self.batch,
            max_model_len=self.prompt + self.output,
            expected_context=context,
            expected_output=2 * context,
        )


async def measure(policy: Policy, setting: Setting, seconds: float) -> Cell:
    """A policy's cell; one that does not come to be within `seconds` says why."""
    cell: Cell = {"policy": policy, "label": policy.label, "paper": policy.paper}
    try:
        config = setting.config(policy)
        async with asyncio.timeout(seconds):
            with emulated(policy, setting.hidden_layers):
                run = await _observe(setting, config)
        return cell | _measured(run, config)
    except TimeoutError:
        return cell | {"failure": f"took more than {seconds:g} s"}
    except HsrpcError as error:
        return cell | {"failure": str(error)}
    except Exception as error:  # such as memory that the device does not have: the other policies may do
        traceback.print_exc()
        return cell | {"failure": f"{type(error).__name__}: {error}"}


async def _observe(setting: Setting, config: EngineConfig) -> Run:
    num_whole = 0

    def is_whole(record: StepRecord) -> bool:
        return record.prefill_tokens == 0 and record.decode_tokens == setting.batch

    def is_enough(record: StepRecord) -> bool:
        nonlocal num_whole
        num_whole += is_whole(record)
        return num_whole >= setting.steps + WARM_UP_STEPS

    lengths = {"count": setting.batch, "prompt": setting.prompt, "output": setting.output}

    def make(engine: Engine) -> Workload:
        _check_batch(engine.plan, setting)
        return make_workload(Lengths.UNIFORM, vocab_size=engine.spec.vocab_size, **lengths)

    return await observe_run(
        config,
        make,
        lambda records: list(filter(is_whole, records)),
        is_enough=is_enough,
    )


def _check_batch(plan: Plan, setting: Setting) -> None:
    """Before the run: no step would be whole."""
    if plan.max_batch != setting.batch:
        fitting = f"{plan.max_batch} of {setting.batch} requests fit at once"
        raise BenchError(f"{fitting}; raise gpu_memory or host_memory, or lower the batch")


def _check(run: Run) -> None:
    if len(run.chosen) < FEWEST_STEPS:
        found = f"{len(run.chosen)} steps of the whole batch are fewer than {FEWEST_STEPS}"
        raise BenchError(f"{found}; raise the steps, and the output")


def _measured(run: Run, config: EngineConfig) -> Cell:
    _check(run)
    result, steps = summarise(run, config), run.chosen
    held = sum(step.held_tokens for step in steps)
    return {
        "reason": run.plan.reason,
        "hidden_layers": getattr(run.plan, "hidden_layers", None),
        "num_blocks": {pool.name.lower(): count for pool, count in run.plan.num_blocks.items()},
        "held_tokens": held / len(steps),
        "share": sum(step.regenerated_tokens for step in steps) / (held * run.spec.sizes.num_layers),
        "recomputed_share": sum(step.recomputed_tokens for step in steps) / held,
        "cache_bytes": sum(step.cache_bytes for step in steps) / len(steps),
        "step_seconds": result.step_seconds,
        "limit_seconds": result.limit_seconds,
        "efficiency": result.efficiency,
        "tokens_per_second": result.decode_tokens_per_second,
        "result": result.as_json(),
    }
