"""From the chosen candidate to the plan: whole blocks, bytes by what they are for, and the reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from hsrpc.config import AUTO, CacheCoding
from hsrpc.plan.cache_policy import CacheDecision
from hsrpc.plan.device_memory import SPARE_SLOTS, Staging, device_bytes, pool_bytes
from hsrpc.plan.draft_choice import plan_drafts
from hsrpc.plan.drafting import NO_DRAFTS, Drafting, DraftPlan
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.layer_times import rebuild_rate
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.prediction import as_prediction, simulated
from hsrpc.plan.search import Evaluation, Evaluator, Point
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.recompute import NO_RECOMPUTE, RecomputeLimits
from hsrpc.schedule.step import BufferLimits, RowCosts

_ROUNDED = {
    frozenset({BlockKind.KV}): "K and V are rounded to 8 bits",
    frozenset({BlockKind.ACTIVATION}): "activations are rounded to 8 bits",
    frozenset(BlockKind): "activations, and K and V made of them, are rounded to 8 bits",
}
"""By the kinds of blocks that there may be."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """Makes the plan of a candidate."""

    evaluator: Evaluator
    decision: CacheDecision

    def plan(self, point: Point) -> Plan:
        """All that the candidate means."""
        evaluator = self.evaluator
        model, config = evaluator.model, evaluator.config
        one = evaluator.evaluate(point.as_grid())
        blocks = self._num_blocks(one)
        staging = self._staging(point, one, blocks)
        choices, every_prompt = evaluator.choices, point.batch * evaluator.max_model_len
        choice, sizes = choices.choices[point.choice], model.sizes
        placed, demand = choice.in_sizes(sizes), choice.demand
        lines = {use: int(size) for use, size in device_bytes(sizes, staging).items()}
        lines[DeviceUse.WORKSPACE] += int(choices.tables[point.choice])
        if demand is not None:
            lines[DeviceUse.EXPERTS] = demand.device_bytes
        if choices.spread[point.choice]:
            lines[DeviceUse.SPREAD_WEIGHTS] = int(choices.spread[point.choice])
        if evaluator.budgets.draft_model:
            lines[DeviceUse.DRAFT_MODEL] = evaluator.budgets.draft_model
        share = self._share(one)
        closed = as_prediction(point.batch, model.traffic.context, point.drafts, one.times)
        drafting = Drafting(point.drafts, model.traffic.acceptance, model.traffic.draft_time)
        plan = Plan(
            policy=self.decision.named(share),
            reason=self._reason(point, one, share),
            activation_share=share,
            block_size=config.block_size,
            max_batch=point.batch,
            max_model_len=evaluator.max_model_len,
            max_prefill_tokens=every_prompt if evaluator.recomputes else int(one.chunk),
            spare_prefill_tokens=self._spare_prefill_tokens(point, one),
            max_idle_prefill_tokens=every_prompt if evaluator.recomputes else int(one.idle_chunk),
            recompute=self._recompute(point, one),
            buffers=BufferLimits(point.rows, int(staging.activation_rows), int(staging.queries)),
            costs=_row_costs(sizes, model.hardware),
            resident=choice.resident,
            placed=tuple(layer.placed(stays) for layer, stays in zip(placed.layers, choice.resident, strict=True)),
            demand=demand,
            num_blocks=blocks,
            device_bytes={
                **lines,
                DeviceUse.RUNTIME: evaluator.budgets.runtime,
                DeviceUse.WEIGHT_BUFFERS: int(choices.buffers[point.choice]) + sizes.max_coded_bytes,
                DeviceUse.RESIDENT_WEIGHTS: int(choices.resident[point.choice]),
                DeviceUse.CACHE_BLOCKS: self._pool_bytes(blocks, Tier.DEVICE, SPARE_SLOTS),
            },
            host_bytes={
                HostUse.STREAMED_WEIGHTS: int(choices.on_host[point.choice]),
                HostUse.CACHE_BLOCKS: self._pool_bytes(blocks, Tier.HOST),
            },
            budgets=evaluator.budgets,
            prediction=closed,
            hardware=model.hardware,
            absorbs=point.absorbed_rows > 0,
            cache_format=config.cache_format,
            kinds=evaluator.held.kinds,
            shared_prefix=model.traffic.shared,
            num_gpus=sizes.num_gpus,
            drafts=DraftPlan(drafting=drafting) if point.drafts else NO_DRAFTS,
        )
        plan = replace(plan, prediction=simulated(plan, sizes, closed, recomputes=bool(one.recomputed)))
        given = config.draft_tokens
        if given == 0:
            return plan
        drafts = plan_drafts(plan, sizes, drafting, is_given=given != AUTO)
        return replace(plan, drafts=drafts)

    def _spare_prefill_tokens(self, point: Point, one: Evaluation) -> float:
        """None where no weights stream: there each mini-batch more costs its launches, as it does with a bound."""
        evaluator = self.evaluator
        streams = bool(evaluator.choices.streams[point.choice])
        if not streams or evaluator.recomputes or evaluator.config.max_step_time is not None:
            return 0.0
        return float(evaluator.model.spare_prompt_tokens(point.batch, one.times))

    def _recompute(self, point: Point, one: Evaluation) -> RecomputeLimits:
        evaluator = self.evaluator
        if evaluator.recomputes or not one.recomputed:
            return NO_RECOMPUTE
        streamed = evaluator.choices.on_bus[point.choice] / evaluator.sizes.num_layers
        return RecomputeLimits(
            tokens=int(one.recomputed * point.batch * evaluator.model.traffic.context),
            weights=float(evaluator.model.layer.load(streamed)),
            is_forced=evaluator.config.recompute_share is not None,
        )

    def _staging(self, point: Point, one: Evaluation, blocks: dict[PoolId, int]) -> Staging:
        """Staging as evaluated, in whole numbers, without activation buffers and graphs that nothing would use."""
        staging = Staging(**{item.name: int(getattr(one.staging, item.name)) for item in fields(Staging)})
        if not blocks[PoolId.DEVICE_ACTIVATION] + blocks[PoolId.HOST_ACTIVATION]:
            staging = replace(staging, activation_rows=0)
        pool = PoolId.DEVICE_ACTIVATION if point.absorbed_rows else PoolId.DEVICE_KV
        has_graphs = blocks[pool] > 0 and not self.evaluator.choices.streams[point.choice]
        return staging if has_graphs else replace(staging, graph_batch=0)

    def _share(self, one: Evaluation) -> float:
        """Activations' part of all tokens in use."""
        if not self.decision.is_free and not one.grid.absorbs:
            return self.decision.shares[0]
        on_device = float(one.on_device)
        share = on_device * float(one.grid.device_share) + (1 - on_device) * float(one.host_share)
        return round(share, 4)

    def _reason(self, point: Point, one: Evaluation, share: float) -> str:
        if point.absorbed_rows:
            reason = self.decision.explain_absorbing()
        else:
            reason = self.decision.explain(share, point.device_share, float(one.host_share), float(one.on_device))
        if one.recomputed and not self.evaluator.recomputes:
            reason += f"; {one.recomputed:.0%} of the tokens in use are recomputed in each step, and not cached"
        config, batch = self.evaluator.config, point.batch
        if config.cache_format is not CacheCoding.PLAIN:
            reason += f"; {_ROUNDED[self.evaluator.held.kinds]}, as asked by cache_format={config.cache_format}"
        bounds = "the budgets" if config.max_step_time is None else "the budgets and max_step_time"
        if batch < config.min_batch:
            return f"{reason}; of min_batch={config.min_batch} requests {bounds} allow {batch} at once"
        if config.max_batch is None or batch == config.max_batch:
            return reason
        more = f"more are not within {bounds}, or not faster"
        return f"{reason}; of max_batch={config.max_batch} requests {batch} run at once: {more}"

    def _num_blocks(self, one: Evaluation) -> dict[PoolId, int]:
        """Blocks of each pool; shares rounded to the kind that takes fewer bytes: the other could exceed the budget."""
        rounded = math.ceil if self.evaluator.sizes.activation_ratio >= 1 else math.floor
        device, host = int(one.device_blocks), int(one.host_blocks)
        on_device = rounded(round(device * float(one.grid.device_share), 6))
        on_host = rounded(round(host * float(one.host_share), 6))
        return {
            PoolId.DEVICE_KV: device - on_device,
            PoolId.HOST_KV: host - on_host,
            PoolId.DEVICE_ACTIVATION: on_device,
            PoolId.HOST_ACTIVATION: on_host,
        }

    def _pool_bytes(self, blocks: dict[PoolId, int], tier: Tier, spare: int = 0) -> int:
        """Bytes of a tier's pools, with `spare` slots more in each."""
        block_size = self.evaluator.config.block_size
        slots = {pool.kind: blocks[pool] * block_size + spare for pool in PoolId if pool.tier is tier}
        return pool_bytes(self.evaluator.sizes, slots[BlockKind.KV], slots[BlockKind.ACTIVATION])


def _row_costs(sizes: ModelSizes, hardware: Hardware) -> RowCosts:
    """Seconds of one row in a layer, on average."""
    return RowCosts(
        load_kv=sizes.mean_row_bytes(BlockKind.KV) / hardware.load_bandwidth,
        load_activation=sizes.mean_row_bytes(BlockKind.ACTIVATION) / hardware.load_bandwidth,
        regenerate=float(sizes.mean(lambda layer: layer.regenerate_flop / rebuild_rate(layer, hardware))),
        compute=float(sizes.mean(lambda layer: layer.flop(1))) / (hardware.gemm_rate * hardware.prompt_rate_share),
    )
