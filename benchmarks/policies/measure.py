"""Decode steps of one whole batch under one policy."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decoding import Cell, cell_of, check_steps, observe_decoding
from benchmarks.policies.emulate import Policy
from hsrpc.bench.run import Run, summarise
from hsrpc.config import DeviceKind, DType, EngineConfig, Placement
from hsrpc.model.shapes import RANDOM_PREFIX


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
    """Number of layers with hidden states, in place of HCache's rule."""

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
            min_batch=self.batch,
            max_batch=self.batch,
            max_model_len=self.prompt + self.output,
            expected_context=context,
            expected_output=2 * context,
        )


async def measure(policy: Policy, setting: Setting, seconds: float) -> Cell:
    """A policy's cell; one that does not come to be within `seconds` says why."""
    cell: Cell = {"policy": policy, "label": policy.label, "paper": policy.paper}
    return cell | await cell_of(_measure(policy, setting), seconds)


async def _measure(policy: Policy, setting: Setting) -> Cell:
    config = setting.config(policy)
    run = await observe_decoding(
        config,
        prompt=setting.prompt,
        output=setting.output,
        steps=setting.steps,
        choose_plan=policy.choose_plan(setting.hidden_layers),
    )
    check_steps(run)
    return _measured(policy, run, config)


def _measured(policy: Policy, run: Run, config: EngineConfig) -> Cell:
    result, steps = summarise(run, config), run.chosen
    hidden_layers = run.spec.sizes.num_layers - len(run.plan.kv_layers)
    held = sum(step.held_tokens for step in steps)
    return {
        "reason": run.plan.reason,
        "hidden_layers": hidden_layers if policy is Policy.HCACHE else None,
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
