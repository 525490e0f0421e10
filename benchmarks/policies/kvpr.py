"""KVPR's split by positions: the first tokens of each request are activations, the others K and V.

What is emulated is the split. On our data path the transfer of one mini-batch overlaps the computing of others, so the
wait that KVPR has for its first activations is hidden as well. The split is made once, for the expected context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.policies.rules import kvpr_blocks, row_costs
from hsrpc.config import CachePolicy, EngineConfig, Placement
from hsrpc.errors import ConfigError
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, BlockManager, BlockTable, PoolId


class KvprPlanner(Planner):
    """Plans for a share of activations that follows from KVPR's rule.

    Raises:
        ConfigError: the cache may lie on the device.
    """

    def __init__(self, sizes: ModelSizes, budgets: Budgets, hardware: Hardware, config: EngineConfig) -> None:
        require_host(config)
        plain = Planner(sizes, budgets, hardware, config)
        block_size = config.block_size
        self.first_blocks = kvpr_blocks(row_costs(sizes, hardware), plain.traffic.context, block_size)
        self._longest = -(-plain.max_model_len // block_size)
        # Of a request that has all its blocks, so of no more than any request's first ones: room is never overrated.
        share = self.first_blocks / (self._longest + 1)
        super().__init__(
            sizes, budgets, hardware, replace(config, cache_policy=CachePolicy.HYBRID, activation_share=share)
        )

    def plan(self) -> Plan:
        """As many activation blocks as each request of the batch needs, then K and V up to the host budget."""
        plan, sizes, first = super().plan(), self.sizes, self.first_blocks
        kv_block, activation_block = (plan.block_size * sizes.token_bytes(kind) for kind in BlockKind)
        activations = plan.max_batch * first
        used = plan.host_bytes["streamed weights"] + activations * activation_block
        most = plan.max_batch * (self._longest + 1 - first)
        kv = min(most, (plan.budgets.host - used) // kv_block)
        cache = activations * activation_block + kv * kv_block
        context = self.traffic.context
        plan = replace(
            plan,
            reason=f"KVPR's split for {context} tokens: the first {first * plan.block_size} as activations",
            activation_share=min(1.0, first * plan.block_size / context),
            num_blocks=plan.num_blocks | {PoolId.HOST_KV: kv, PoolId.HOST_ACTIVATION: activations},
            host_bytes=plan.host_bytes | {"cache blocks": cache},
        )
        return replace(plan, prediction=predict_at(self._with_blocks_in_use(plan), sizes, context))

    def _with_blocks_in_use(self, plan: Plan) -> Plan:
        """Pools in the proportion of a request of the expected length."""
        used = -(-self.traffic.context // plan.block_size)
        kinds = {PoolId.HOST_KV: used - self.first_blocks, PoolId.HOST_ACTIVATION: self.first_blocks}
        return replace(plan, num_blocks=plan.num_blocks | kinds)


class PositionBlocks(BlockManager):
    """Hands blocks out by position: each request's first ones are activations, an equal part of them for each."""

    def __init__(self, num_blocks: Mapping[PoolId, int], max_batch: int | None = None) -> None:
        super().__init__(num_blocks, max_batch)
        self._first = num_blocks[PoolId.HOST_ACTIVATION] // (max_batch or 1)

    def grow(self, table: BlockTable, num_blocks: int) -> bool:
        """Append blocks of the kinds that their positions have, or none where either kind has too few."""
        activations = min(max(self._first - len(table), 0), num_blocks)
        kinds = {PoolId.HOST_ACTIVATION: activations, PoolId.HOST_KV: num_blocks - activations}
        if any(count > self.pools[pool].num_free for pool, count in kinds.items()):
            return False
        for pool, count in kinds.items():
            for _ in range(count):
                table.append(pool, self.pools[pool].allocate(table.last_of(pool)))
        return True


def require_host(config: EngineConfig) -> None:
    """The emulations know of the host's blocks only.

    Raises:
        ConfigError: the cache may lie on the device.
    """
    if config.placement is not Placement.HOST:
        raise ConfigError("placement", config.placement, "not emulated", "use placement=host")
