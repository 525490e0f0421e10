"""KVPR's split by positions: the first tokens of each request are activations, the others K and V.

What is emulated is the split. On our data path the transfer of one mini-batch overlaps the computing of others, so the
wait that KVPR has for its first activations is hidden as well. The split is made once, for the expected context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.policies.planning import with_share
from benchmarks.policies.rules import kvpr_blocks, row_costs
from hsrpc.plan.memory_use import HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.schedule.blocks import BlockKind, PoolId, Pools


@dataclass(frozen=True, slots=True)
class ByPosition:
    """Each request's first blocks are activations, the others K and V; neither kind stands in for the other."""

    num_activations: int
    """Blocks of a request that are activations."""

    def has_room(self, pools: Pools, number: int, wanted: int) -> bool:
        activations = self._activations(number, wanted)
        needed = {PoolId.HOST_ACTIVATION: activations, PoolId.HOST_KV: wanted - activations}
        return all(count <= pools[pool].num_free for pool, count in needed.items())

    def next_run(self, pools: Pools, number: int, wanted: int) -> tuple[PoolId, int]:
        activations = self._activations(number, wanted)
        return (PoolId.HOST_ACTIVATION, activations) if activations else (PoolId.HOST_KV, wanted)

    def _activations(self, number: int, wanted: int) -> int:
        """How many of the `wanted` blocks from block `number` on are activations."""
        return min(max(self.num_activations - number, 0), wanted)


def kvpr_plan(planner: Planner) -> Plan:
    """hsrpc's plan for KVPR's share: as many activation blocks as the batch needs, then K and V up to the host budget.

    Raises:
        ConfigError: as `Planner.plan`; the cache may lie on the device.
    """
    sizes, context, block_size = planner.sizes, planner.traffic.context, planner.config.block_size
    first = kvpr_blocks(row_costs(sizes, planner.hardware), context, block_size)
    longest = -(-planner.max_model_len // block_size)
    # The share of a request with all its blocks, the smallest that any request has: room is never overrated.
    plan = with_share(planner, first / (longest + 1)).plan()
    kv_block, activation_block = (block_size * sizes.token_bytes(kind) for kind in BlockKind)
    activations = plan.max_batch * first
    used = plan.host_bytes[HostUse.STREAMED_WEIGHTS] + activations * activation_block
    max_kv = plan.max_batch * (longest + 1 - first)
    kv = min(max_kv, (plan.budgets.host - used) // kv_block)
    cache = activations * activation_block + kv * kv_block
    plan = replace(
        plan,
        reason=f"KVPR's split for {context} tokens: the first {first * block_size} as activations",
        activation_share=min(1.0, first * block_size / context),
        num_blocks=plan.num_blocks | {PoolId.HOST_KV: kv, PoolId.HOST_ACTIVATION: activations},
        host_bytes=plan.host_bytes | {HostUse.CACHE_BLOCKS: cache},
        kind_rule=ByPosition(first),
    )
    return replace(plan, prediction=predict_at(_with_blocks_in_use(plan, first, context), sizes, context))


def _with_blocks_in_use(plan: Plan, first: int, context: int) -> Plan:
    """Pools in the proportion of a request of `context` tokens, whose `first` blocks are activations."""
    kinds = {PoolId.HOST_KV: -(-context // plan.block_size) - first, PoolId.HOST_ACTIVATION: first}
    return replace(plan, num_blocks=plan.num_blocks | kinds)
