"""HCache's split by layers: hidden states (activations) in the first layers, K and V in the others.

The tables know of activation blocks only. In the layers with K and V their pool has rows of K and V in place of
activations; these are loaded to the rows of the kv buffer that regeneration would fill, and nothing is rebuilt there.
HCache restores the cache of a request that comes back; here that is done in every step, as it is for the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from benchmarks.policies.kvpr import require_host
from benchmarks.policies.rules import hcache_layers, row_costs
from hsrpc.config import CachePolicy, EngineConfig
from hsrpc.device.device import Device, Event
from hsrpc.engine.bus import BusOrder
from hsrpc.engine.forward import DeviceBatch, Forward
from hsrpc.engine.tasks.cache import Buffers, CacheManager, Loads, Staged, Stores
from hsrpc.engine.tasks.weights import Prefetched
from hsrpc.engine.weights import ModelWeights
from hsrpc.errors import ConfigError
from hsrpc.model.attention import Attention
from hsrpc.model.family import Family
from hsrpc.model.formats.format import Formats
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.packing import merge_runs
from hsrpc.schedule.step import Ints, MiniBatch, RowCosts, Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplitPlan(Plan):
    """A plan whose host blocks hold activations in the first layers, K and V in the others."""

    hidden_layers: int


class HCachePlanner(Planner):
    """Plans for blocks of which as large a part are activations as of the layers here.

    A block of both kinds, by layers, takes as many bytes as those take on average, and that is what `Evaluator` divides
    the host budget by: as many blocks fit.

    Raises:
        ConfigError: there is no such number of layers, or the cache may lie on the device.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        budgets: Budgets,
        hardware: Hardware,
        config: EngineConfig,
        *,
        hidden_layers: int | None = None,
    ) -> None:
        """Without `hidden_layers`, as many as HCache's rule gives."""
        require_host(config)
        layers, by_rule = sizes.num_layers, hcache_layers(row_costs(sizes, hardware), sizes.num_layers)
        self.hidden_layers = by_rule if hidden_layers is None else hidden_layers
        if not 1 <= self.hidden_layers <= layers:
            problem = "no layer has hidden states" if self.hidden_layers == 0 else f"the model has {layers} layers"
            raise ConfigError(
                "hidden_layers", self.hidden_layers, problem, f"give 1 to {layers}, or measure the policy kv"
            )
        share = self.hidden_layers / layers
        super().__init__(
            sizes, budgets, hardware, replace(config, cache_policy=CachePolicy.HYBRID, activation_share=share)
        )

    def plan(self) -> LayerSplitPlan:
        """All blocks in the pool of activations."""
        plan, sizes, hidden = super().plan(), self.sizes, self.hidden_layers
        num_blocks = sum(plan.num_blocks.values())
        row_bytes = sum(layer.activation.num_bytes for layer in sizes.layers[:hidden])
        row_bytes += sum(layer.kv.num_bytes for layer in sizes.layers[hidden:])
        changes = {
            "reason": f"HCache's split: hidden states in {hidden} of {sizes.num_layers} layers, K and V in the others",
            "num_blocks": dict.fromkeys(PoolId, 0) | {PoolId.HOST_ACTIVATION: num_blocks},
            "host_bytes": plan.host_bytes | {"cache blocks": num_blocks * plan.block_size * row_bytes},
            "costs": _mean_costs(plan.costs, hidden / sizes.num_layers),
        }
        same = {item.name: getattr(plan, item.name) for item in fields(plan)}
        return LayerSplitPlan(**same | changes, hidden_layers=hidden)


class LayerSplitCache(CacheManager):
    """Loads and stores activations in the first layers, K and V of the same blocks in the others."""

    def __init__(
        self, sizes: ModelSizes, plan: LayerSplitPlan, device: Device, formats: Formats, bus: BusOrder
    ) -> None:
        self.hidden_layers = plan.hidden_layers
        super().__init__(sizes, plan, device, formats, bus)

    def _fill(self, buffers: Buffers, loads: Loads, layer: int) -> None:
        if layer < self.hidden_layers:
            self._copy(buffers.activations, loads.activations, layer)
        else:
            self._copy(buffers.kv, loads.kv, layer)

    def store(self, tier: Tier, layer: int, stores: Mapping[PoolId, Stores], kv: torch.Tensor, x: torch.Tensor) -> None:
        super().store(tier, layer, stores, kv, x if layer < self.hidden_layers else kv.contiguous())

    def _allocate(self, pool: PoolId, num_slots: int) -> list[torch.Tensor]:
        if pool is not PoolId.HOST_ACTIVATION:
            return super()._allocate(pool, num_slots)
        hidden, dtype = self.hidden_layers, self._formats.activation.dtype
        rows = self._rows[BlockKind.ACTIVATION][:hidden] + self._rows[BlockKind.KV][hidden:]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pin") as threads:
            pinned = threads.map(self._device.pinned, [num_slots * row.num_bytes for row in rows])
            return [memory.view(dtype).view(num_slots, -1) for memory in pinned]

    def _loads(self, batch: MiniBatch) -> Loads:
        """The same blocks twice: for the kv buffer of the layers with K and V, and for the activation buffer."""
        loads = batch.activation_loads
        return Loads({pool: _to_rows(runs, batch.activation_rows) for pool, runs in loads.items()}, loads)


class LayerSplitForward(Forward):
    """Rebuilds nothing in the layers with K and V."""

    def __init__(
        self,
        family: Family,
        weights: ModelWeights,
        cache: LayerSplitCache,
        attention: Attention,
        device: Device,
        *,
        max_queries: int,
    ) -> None:
        super().__init__(family, weights, cache, attention, device, max_queries=max_queries)
        self._hidden_layers = cache.hidden_layers

    def compute(self, weights: Prefetched, staged: Staged, batch: DeviceBatch) -> tuple[Event, Event]:
        return super().compute(
            weights, staged, batch if weights.layer < self._hidden_layers else _without_rebuilding(batch)
        )


def _without_rebuilding(batch: DeviceBatch) -> DeviceBatch:
    none = slice(0)
    return replace(
        batch,
        num_rebuilt=0,
        activation_rows=batch.activation_rows[none],
        activation_positions=batch.activation_positions[none],
    )


def _to_rows(runs: Runs, rows: Ints) -> Runs:
    """The copies of `runs` to `rows[i]` in place of row i; neighbours are joined anew."""
    each = runs.rows()
    return merge_runs(each.source, rows[each.target], np.ones_like(each.source))


def _mean_costs(costs: RowCosts, share: float) -> RowCosts:
    """Of a row in a layer, on average, where `share` of the layers have activations."""
    load = share * costs.load_activation + (1 - share) * costs.load_kv
    return RowCosts(load_kv=costs.load_kv, load_activation=load, regenerate=share * costs.regenerate)
