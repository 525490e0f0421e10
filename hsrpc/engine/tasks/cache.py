"""The cache manager: owns the pools behind the blocks, fills a mini-batch's buffers from them, stores new rows."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.device.device import Device, Event
from hsrpc.device.uploads import Upload
from hsrpc.engine.bus import BusOrder
from hsrpc.engine.worker import Worker
from hsrpc.model.formats.format import Formats
from hsrpc.plan.plan import BUFFERS, Plan
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.packing import merge_runs
from hsrpc.schedule.step import MiniBatch, Rows, Runs, Step

_MIN_RUN = 16
"""Rows that are worth a copy of their own."""


class Buffers(NamedTuple):
    """Device memory of one mini-batch in one layer."""

    kv: torch.Tensor
    """[rows, 2*kv]"""
    activations: torch.Tensor
    """[activation_rows, h]"""


class Staged(NamedTuple):
    """Buffers that hold a mini-batch's cached rows once `loaded` has happened."""

    buffers: Buffers
    loaded: Event


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """`Rows`, on the device: int64 [n] each."""

    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, rows: Rows, upload: Upload) -> DeviceRows:
        return cls(upload(rows.source), upload(rows.target))


@dataclass(frozen=True, slots=True)
class Stores:
    """New rows of a mini-batch on their way to a pool."""

    rows: DeviceRows
    """By a kernel: decode has one row of each request."""
    runs: Runs
    """By copy engine, which leaves the GPU to others: prompts. On the host."""

    @classmethod
    def of(cls, pool: PoolId, rows: Rows, upload: Upload) -> Stores:
        """Long runs of activations for the host are runs; rows of K and V are not contiguous."""
        runs = merge_runs(rows.source, rows.target, np.ones_like(rows.source))
        is_long = (runs.count >= _MIN_RUN) & (pool is PoolId.HOST_ACTIVATION)
        return cls(DeviceRows.of(runs.where(~is_long).rows(), upload), runs.where(is_long))


class Loads(NamedTuple):
    """What comes from host pools to a mini-batch's buffers, in every layer alike."""

    kv: Mapping[PoolId, Runs]
    activations: Mapping[PoolId, Runs]


class Gathers(NamedTuple):
    """What comes from device pools."""

    kv: Mapping[PoolId, DeviceRows]
    activations: Mapping[PoolId, DeviceRows]


class CacheManager:
    """Task that loads, layer by layer and mini-batch by mini-batch, as far ahead as there are buffers."""

    def __init__(self, sizes: ModelSizes, plan: Plan, device: Device, formats: Formats, bus: BusOrder) -> None:
        self.loaded_bytes = 0
        """Cache bytes copied from host to device since the start."""
        self._device = device
        self._bus = bus
        self._num_begun = 0
        self._num_layers = sizes.num_layers
        self._formats = formats
        self._rows = {kind: [layer.row(kind) for layer in sizes.layers] for kind in BlockKind}
        self._pools = {pool: self._allocate(pool, count * plan.block_size) for pool, count in plan.num_blocks.items()}
        self._steps: asyncio.Queue[Step] = asyncio.Queue(1)
        self._free: asyncio.Queue[tuple[Buffers, Event]] = asyncio.Queue(BUFFERS)
        self._ready: asyncio.Queue[Staged] = asyncio.Queue(BUFFERS)
        self._stored: Event = None
        for _ in range(BUFFERS):
            kv = self._buffer(BlockKind.KV, plan.buffers.rows)
            activations = self._buffer(BlockKind.ACTIVATION, plan.buffers.activation_rows)
            self._free.put_nowait((Buffers(kv, activations), None))

    async def run(self) -> None:
        """Load step after step; ends by cancellation."""
        async with Worker("cache") as worker:
            while True:
                await self._load_step(worker, await self._steps.get())

    async def begin(self, step: Step) -> None:
        """Start to load for `step`; the step before it has ended."""
        await self._steps.put(step)

    async def take(self) -> Staged:
        """Buffers of the next mini-batch of the layer, then of the next layer; not filled in an abandoned step."""
        return await self._ready.get()

    async def drain(self, count: int) -> None:
        """Take the last `count` buffers of an abandoned step, unread."""
        for _ in range(count):
            staged = await self.take()
            self.give_back(staged, staged.loaded)

    def give_back(self, staged: Staged, freed: Event) -> None:
        """Its buffers may be overwritten once `freed` has happened."""
        self._free.put_nowait((staged.buffers, freed))

    def borrow(self) -> list[Staged]:
        """All buffers, for a step that this task does not load: free once `loaded` has happened, to be given back."""
        return [Staged(*self._free.get_nowait()) for _ in range(BUFFERS)]

    def prepare(self, step: Step) -> list[Loads]:
        """What `load` needs for each mini-batch, in every layer alike; it comes after what was stored before."""
        self._device.wait(self._device.load, self._stored)
        return [self._loads(batch) for batch in step.mini_batches]

    def load(self, layer: int, loads: Loads, staged: Staged) -> Staged:
        """Launch the copies of a mini-batch's rows of a layer to buffers that are free once `loaded` has happened."""
        if not (loads.kv or loads.activations):
            return staged
        device = self._device
        device.wait(device.load, staged.loaded)
        with device.on(device.load):
            self._fill(staged.buffers, loads, layer)
        return Staged(staged.buffers, device.record(device.load))

    def gathers(self, batch: MiniBatch, upload: Upload) -> Gathers:
        """What `gather` needs for a mini-batch, in every layer alike."""
        kv, activations = (
            {pool: DeviceRows.of(runs.rows(), upload) for pool, runs in loads.items()}
            for loads in _loads_from(Tier.DEVICE, batch)
        )
        return Gathers(kv, activations)

    def gather(self, buffers: Buffers, gathers: Gathers, layer: int) -> None:
        """Copy a mini-batch's rows of a layer from the device's blocks into its buffers, on the current stream.

        Called on the executor's thread, for the compute stream: on that of the loads, the bus would wait until the
        GPU has room for another kernel.
        """
        for buffer, pools in zip(buffers, gathers, strict=True):
            for pool, rows in pools.items():
                self._device.copy_rows(buffer, rows.target, self._pools[pool][layer], rows.source)

    def device_kv(self, layer: int) -> torch.Tensor:
        """The pool of KV blocks on the device [slots, 2*kv], which attention reads in place."""
        return self._pools[PoolId.DEVICE_KV][layer]

    @property
    def spare_slot(self) -> int:
        """Of each layer's pool of KV blocks on the device: it belongs to no block."""
        return len(self._pools[PoolId.DEVICE_KV][0]) - 1

    def store(self, tier: Tier, layer: int, stores: Mapping[PoolId, Stores], kv: torch.Tensor, x: torch.Tensor) -> None:
        """Write new rows to their blocks in `tier`, on the current stream: kv [n, 2*kv] or x [n, h].

        Called on the executor's thread: for the device on the compute stream, for the host on the store stream.
        """
        for pool, new in stores.items():
            if pool.tier is tier:
                source, target = kv if pool.kind is BlockKind.KV else x, self._pools[pool][layer]
                self._device.copy_rows(target, new.rows.target, source, new.rows.source)
                if len(new.runs.count):
                    self._device.copy_runs(target, source, new.runs)
                if tier is Tier.HOST:
                    self._device.keep(source, self._device.store)

    def stored(self) -> None:
        """All stores of a step are launched: later loads wait for them."""
        self._stored = self._device.record(self._device.store)

    def _buffer(self, kind: BlockKind, num_rows: int) -> torch.Tensor:
        """A mini-batch's rows, in every layer."""
        width = max(row.width for row in self._rows[kind])
        return self._device.empty((num_rows, width), self._formats.cache(kind).dtype)

    def _allocate(self, pool: PoolId, num_slots: int) -> list[torch.Tensor]:
        """One tensor [slots, width] a layer, so that a layer's blocks are neighbours."""
        rows, dtype = self._rows[pool.kind], self._formats.cache(pool.kind).dtype
        if pool.tier is Tier.DEVICE:  # with a spare row
            return [self._device.empty((num_slots + 1, row.width), dtype) for row in rows]
        if num_slots == 0:
            return []
        sizes = [num_slots * row.num_bytes for row in rows]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pin") as threads:
            pinned = threads.map(self._device.pinned, sizes)
            return [memory.view(dtype).view(num_slots, -1) for memory in pinned]

    async def _load_step(self, worker: Worker, step: Step) -> None:
        start = self._num_begun * self._num_layers
        self._num_begun += 1
        self._bus.move(start)
        loads = await worker.run(partial(self.prepare, step))
        for layer in range(self._num_layers):
            for number, each in enumerate(loads, start=1):
                staged = Staged(*await self._free.get())
                if not step.is_abandoned:
                    staged = await worker.run(partial(self.load, layer, each, staged))
                self._bus.move(start + layer + number / len(loads))
                await self._ready.put(staged)
        self._bus.move(math.inf)

    def _loads(self, batch: MiniBatch) -> Loads:
        return Loads(*_loads_from(Tier.HOST, batch))

    def _fill(self, buffers: Buffers, loads: Loads, layer: int) -> None:
        self._copy(buffers.kv, loads.kv, layer)
        self._copy(buffers.activations, loads.activations, layer)

    def _copy(self, buffer: torch.Tensor, loads: Mapping[PoolId, Runs], layer: int) -> None:
        for pool, runs in loads.items():
            self._device.copy_runs(buffer, self._pools[pool][layer], runs)
            self.loaded_bytes += runs.num_rows * buffer.shape[1] * buffer.element_size()


def _loads_from(tier: Tier, batch: MiniBatch) -> Iterator[dict[PoolId, Runs]]:
    """Of K and V, then of activations."""
    for loads in (batch.kv_loads, batch.activation_loads):
        yield {pool: runs for pool, runs in loads.items() if pool.tier is tier}
