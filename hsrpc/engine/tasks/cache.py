"""The cache manager: owns the pools behind the blocks, fills a mini-batch's buffers from them, stores new rows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.device.device import Device
from hsrpc.device.uploads import Upload
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.worker import Worker
from hsrpc.model.formats.rows import CopyRows, Rows
from hsrpc.plan.device_memory import SPARE_SLOTS
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.packing import merge_runs
from hsrpc.schedule.step import Ints, MiniBatch, Runs, Step
from hsrpc.schedule.step import Rows as StepRows
from hsrpc.schedule.sweep import BUFFERS, Lane, Op

_MIN_RUN = 16
"""Rows that are worth a copy of their own."""


class Buffers(NamedTuple):
    """Device memory of one mini-batch in one layer."""

    kv: torch.Tensor
    """[rows, columns of the family's `kv_rows`]"""
    activations: torch.Tensor
    """[activation_rows, columns of its `activation_rows`]"""


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Row numbers of a step, on the device: int64 [n] each."""

    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, rows: StepRows, upload: Upload) -> DeviceRows:
        return cls(upload(rows.source), upload(rows.target))


@dataclass(frozen=True, slots=True)
class Stores:
    """New rows of a mini-batch on their way to a pool."""

    rows: DeviceRows
    """Rows that a kernel copies: decode has one row of each request."""
    runs: Runs
    """Runs that the copy engine copies, which leaves the GPU free: prompts. Their numbers are on the host."""

    @classmethod
    def of(cls, pool: PoolId, held: BlockKind, rows: StepRows, upload: Upload) -> Stores:
        """Long runs of activations for the host are runs; rows of K and V are not contiguous."""
        runs = merge_runs(rows.source, rows.target, np.ones_like(rows.source))
        is_long = (runs.count >= _MIN_RUN) & (pool is PoolId.HOST_ACTIVATION and held is BlockKind.ACTIVATION)
        return cls(DeviceRows.of(runs.where(~is_long).rows(), upload), runs.where(is_long))


class LayerKind(NamedTuple):
    """What layers have in common to which the same rows are copied."""

    window: int
    """Number of their window among the model's."""
    held: BlockKind
    """What activation blocks hold."""


class Loads(NamedTuple):
    """What comes from host pools to a mini-batch's buffers, in all layers of a kind."""

    kv: Mapping[PoolId, Runs]
    activations: Mapping[PoolId, Runs]


class Gathers(NamedTuple):
    """What comes from device pools."""

    kv: Mapping[PoolId, DeviceRows]
    activations: Mapping[PoolId, DeviceRows]


class CacheManager:
    """Task that runs the cache's lane of each step: it loads blocks, ahead of the executor by its buffers."""

    def __init__(self, sizes: ModelSizes, plan: Plan, device: Device, formats: Mapping[BlockKind, Rows]) -> None:
        """`formats`: rows of each kind of block, in all layers alike."""
        self.loaded_bytes = 0
        """Cache bytes copied from host to device since the start."""
        self.steps: asyncio.Queue[StepRun] = asyncio.Queue(1)
        self._device = device
        self._plan = plan
        self._formats = formats
        self.write_kv: CopyRows = formats[BlockKind.KV].writer(device.copy_rows)
        """Writes rows of K and V [*, k+v] as rows of blocks, or of a buffer."""
        self._kinds = tuple(
            LayerKind(window, plan.held(BlockKind.ACTIVATION, layer))
            for layer, window in enumerate(sizes.windows.numbers)
        )
        """Kind of each layer."""
        self._rows = {
            kind: [layer.row(plan.held(kind, number)) for number, layer in enumerate(sizes.layers)]
            for kind in BlockKind
        }
        """What a block of each kind keeps of a token, layer by layer."""
        self._pools = {pool: self._allocate(pool, count * plan.block_size) for pool, count in plan.num_blocks.items()}
        counts = {BlockKind.KV: plan.buffers.rows, BlockKind.ACTIVATION: plan.buffers.activation_rows}
        self.buffers = [Buffers(*(self._buffer(kind, counts[kind]) for kind in BlockKind)) for _ in range(BUFFERS)]
        self._loads: list[dict[LayerKind, Loads]] = []
        """Loads of each mini-batch, by kind of layer."""

    async def run(self) -> None:
        """Run step after step; ends by cancellation."""
        async with Worker("cache") as worker:
            while True:
                step = await self.steps.get()
                self.begin(step.step)
                await step.run(Lane.CACHE, worker, self.launch)

    def begin(self, step: Step) -> None:
        """Take the copies of a step."""
        kinds = set(self._kinds)
        self._loads = [{kind: _loads_from(Tier.HOST, batch, kind) for kind in kinds} for batch in step.mini_batches]

    def launch(self, op: Op) -> None:
        """Load a mini-batch's rows of a layer from the host to a buffer, on the current stream."""
        for buffer, loads in zip(self.buffers[op.slot], self._loads[op.batch][self._kinds[op.layer]], strict=True):
            for pool, runs in loads.items():
                self._device.copy_runs(buffer, self._pools[pool][op.layer], runs)
                self.loaded_bytes += runs.num_rows * self._rows[pool.kind][op.layer].num_bytes

    def gathers(self, batch: MiniBatch, upload: Upload) -> dict[LayerKind, Gathers]:
        """What `gather` needs for a mini-batch, by kind of layer."""
        return {kind: _as_gathers(_loads_from(Tier.DEVICE, batch, kind), upload) for kind in set(self._kinds)}

    def gather(self, buffers: Buffers, gathers: Mapping[LayerKind, Gathers], layer: int) -> None:
        """Copy a mini-batch's rows of a layer from the device's blocks into its buffers, on the current stream.

        Called on the executor's thread, for the compute stream: on that of the loads, the bus would wait until the
        GPU has room for another kernel.
        """
        for buffer, pools in zip(buffers, gathers[self._kinds[layer]], strict=True):
            for pool, rows in pools.items():
                self._device.copy_rows(buffer, rows.target, self._pools[pool][layer], rows.source)

    def in_place(self, layer: int) -> torch.Tensor:
        """The pool of blocks on the device that attention reads in place: [slots, columns]."""
        return self._pools[self._plan.in_place][layer]

    @property
    def spare_slot(self) -> int:
        """Slot that belongs to no block, in each layer's pool of blocks that are read in place."""
        return len(self._pools[self._plan.in_place][0]) - 1

    def stores(self, batch: MiniBatch, upload: Upload) -> dict[BlockKind, dict[PoolId, Stores]]:
        """What `store` needs for a mini-batch, by what activation blocks hold in a layer."""
        return {
            held: {pool: Stores.of(pool, held, rows, upload) for pool, rows in batch.stores.items()}
            for held in {kind.held for kind in self._kinds}
        }

    def store(
        self,
        tier: Tier,
        layer: int,
        stores: Mapping[BlockKind, Mapping[PoolId, Stores]],
        kv: torch.Tensor,
        x: torch.Tensor,
    ) -> None:
        """Write new rows to their blocks in `tier`, on the current stream: kv [n, k+v], or x as they are stored.

        Called on the executor's thread: for the device on the compute stream, for the host on the store stream.
        """
        for pool, new in stores[self._kinds[layer].held].items():
            if pool.tier is tier:
                holds_kv, target = self._plan.held(pool.kind, layer) is BlockKind.KV, self._pools[pool][layer]
                source, write = (kv, self.write_kv) if holds_kv else (x, self._device.copy_rows)
                write(target, new.rows.target, source, new.rows.source)
                if len(new.runs.count):
                    self._device.copy_runs(target, source, new.runs)
                if tier is Tier.HOST:
                    self._device.keep(source, self._device.store)

    def _buffer(self, kind: BlockKind, num_rows: int) -> torch.Tensor:
        """A mini-batch's rows, in every layer."""
        rows = self._formats[kind]
        return self._device.empty((num_rows, rows.columns), rows.dtype, DeviceUse.CACHE_BUFFERS)

    def _allocate(self, pool: PoolId, num_slots: int) -> list[torch.Tensor]:
        """One tensor [slots, columns] a layer, so that its blocks are neighbours, in the format of what they hold."""
        rows = self._rows[pool.kind]
        held = (self._plan.held(pool.kind, layer) for layer in range(len(rows)))
        dtypes = [self._formats[kind].dtype for kind in held]
        if pool.tier is Tier.DEVICE:
            columns = [row.num_bytes // dtype.itemsize for row, dtype in zip(rows, dtypes, strict=True)]
            shapes = [(num_slots + SPARE_SLOTS, count) for count in columns]
            return [
                self._device.empty(shape, dtype, DeviceUse.CACHE_BLOCKS)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
        if num_slots == 0:
            return []
        pin = partial(self._device.pinned, use=HostUse.CACHE_BLOCKS)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pin") as threads:
            pinned = threads.map(pin, [num_slots * row.num_bytes for row in rows])
            return [memory.view(dtype).view(num_slots, -1) for memory, dtype in zip(pinned, dtypes, strict=True)]


def _loads_from(tier: Tier, batch: MiniBatch, kind: LayerKind) -> Loads:
    """A mini-batch's copies in layers of a kind."""
    layout = batch.layouts[kind.window]
    kv, activations = (
        {pool: runs for pool, runs in loads.items() if pool.tier is tier}
        for loads in (layout.kv_loads, layout.activation_loads)
    )
    if kind.held is BlockKind.ACTIVATION:
        return Loads(kv, activations)
    return Loads(kv | {pool: _to_rows(runs, layout.activation_rows) for pool, runs in activations.items()}, {})


def _to_rows(runs: Runs, rows: Ints) -> Runs:
    """The copies of `runs` to `rows[i]` in place of row i; neighbours are joined again."""
    each = runs.rows()
    return merge_runs(each.source, rows[each.target], np.ones_like(each.source))


def _as_gathers(loads: Loads, upload: Upload) -> Gathers:
    return Gathers(*({pool: DeviceRows.of(runs.rows(), upload) for pool, runs in each.items()} for each in loads))
