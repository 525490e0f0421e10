"""HCache's split by layers: hidden states (activations) in the first layers, K and V in the others.

All blocks are activation blocks, and hold K and V in the layers that the plan says. HCache restores the cache of a
request that comes back; here that is done in every step, as it is for the other policies.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.policies.planning import with_share
from benchmarks.policies.rules import hcache_layers, row_costs
from hsrpc.errors import ConfigError
from hsrpc.plan.memory_use import HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.step import RowCosts


def hcache_plan(planner: Planner, hidden_layers: int | None = None) -> Plan:
    """hsrpc's plan for blocks of which as large a part are activations as of the layers here, with the split by layers.

    A block of both kinds, by layers, takes as many bytes as those take on average, and that is what the planner divides
    the host budget by: as many blocks fit. Without `hidden_layers`, as many as HCache's rule gives.

    Raises:
        ConfigError: as `Planner.plan`; there is no such number of layers, or the cache may lie on the device.
    """
    sizes = planner.sizes
    layers, hidden = sizes.num_layers, _hidden_layers(planner, hidden_layers)
    plan = with_share(planner, hidden / layers).plan()
    num_blocks = sum(plan.num_blocks.values())
    row_bytes = sum(layer.activation.num_bytes for layer in sizes.layers[:hidden])
    row_bytes += sum(layer.kv.num_bytes for layer in sizes.layers[hidden:])
    return replace(
        plan,
        reason=f"HCache's split: hidden states in {hidden} of {layers} layers, K and V in the others",
        num_blocks=dict.fromkeys(PoolId, 0) | {PoolId.HOST_ACTIVATION: num_blocks},
        host_bytes=plan.host_bytes | {HostUse.CACHE_BLOCKS: num_blocks * plan.block_size * row_bytes},
        costs=_mean_costs(plan.costs, hidden / layers),
        kv_layers=frozenset(range(hidden, layers)),
    )


def _hidden_layers(planner: Planner, wanted: int | None) -> int:
    layers = planner.sizes.num_layers
    hidden = hcache_layers(row_costs(planner.sizes, planner.hardware), layers) if wanted is None else wanted
    if not 1 <= hidden <= layers:
        problem = "no layer has hidden states" if hidden == 0 else f"the model has {layers} layers"
        raise ConfigError("hidden_layers", hidden, problem, f"give 1 to {layers}, or measure the policy kv")
    return hidden


def _mean_costs(costs: RowCosts, share: float) -> RowCosts:
    """Costs of a row in a layer, on average, where `share` of the layers have activations."""
    load = share * costs.load_activation + (1 - share) * costs.load_kv
    return replace(costs, load_activation=load, regenerate=share * costs.regenerate)
