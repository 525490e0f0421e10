"""Prefetches layer weights from pinned memory, in parts that go between the blocks of the cache."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from hsrpc.device.device import Device, Event
from hsrpc.engine.bus import BusOrder
from hsrpc.engine.weights import Decoding, ModelWeights, OpenedLayer
from hsrpc.engine.worker import Worker
from hsrpc.plan.plan import BUFFERS, Plan

_MIN_PART_BYTES = 16 * 1024**2
"""Of one part of a layer's weights: smaller copies waste the bus."""


class Prefetched(NamedTuple):
    """Weights of a layer on the device once `loaded` has happened."""

    layer: int
    tensors: Mapping[str, torch.Tensor]
    buffer: torch.Tensor | None
    """Goes back with `WeightPrefetcher.give_back`; None for a layer that is resident."""
    loaded: Event
    restarts: int
    decodings: tuple[Decoding, ...] = ()
    """To be done before the tensors are used."""


class WeightPrefetcher:
    """Task that sweeps over the streamed layers, as far ahead of the executor as there are buffers.

    A layer's weights go in parts, spread over the blocks of the layers from the streamed one before it on.
    """

    def __init__(self, weights: ModelWeights, plan: Plan, device: Device, bus: BusOrder) -> None:
        self.streamed_bytes = 0
        """Copied to the device since the start."""
        self._weights = weights
        self._device = device
        self._bus = bus
        self._streamed = [i for i, layer in enumerate(weights.layers) if layer.packed is not None]
        self._free: asyncio.Queue[tuple[torch.Tensor, Event]] = asyncio.Queue(BUFFERS)
        self._ready: asyncio.Queue[Prefetched] = asyncio.Queue(BUFFERS)
        self._sweep = self._cursor = self._restarts = 0
        for _ in range(BUFFERS if self._streamed else 0):
            self._free.put_nowait((device.empty((plan.weight_buffer_bytes,), torch.uint8), None))
        self._decoded = device.empty((plan.decode_buffer_bytes,), torch.uint8)
        self._made: dict[tuple[int, int], OpenedLayer] = {}
        """By layer and address of the buffer."""

    async def run(self) -> None:
        """Prefetch for ever; ends by cancellation."""
        async with Worker("weights") as worker:
            while True:
                buffer, freed = await self._free.get()
                await self._ready.put(await self._prefetch(worker, buffer, freed))

    async def take(self, layer: int) -> Prefetched:
        """The weights of `layer`; layers are taken in order."""
        weights = self._weights.layers[layer]
        if weights.packed is None:
            return Prefetched(layer, weights.resident, None, None, self._restarts)
        while True:
            ready = await self._ready.get()
            if ready.restarts == self._restarts:
                return ready
            self.give_back(ready, ready.loaded)

    def give_back(self, taken: Prefetched, freed: Event) -> None:
        """Its buffer may be overwritten once `freed` has happened."""
        if taken.buffer is not None:
            self._free.put_nowait((taken.buffer, freed))

    def restart(self, sweep: int) -> None:
        """Begin `sweep` (of steps, from 0) at its first layer: what is left of the one before is not wanted."""
        self._restarts += 1
        self._sweep, self._cursor = sweep, 0

    def _next_span(self) -> tuple[float, float]:
        """Positions on the bus of the streamed layer before the one at the cursor, and of that one."""
        num_layers, streamed, cursor = len(self._weights.layers), self._streamed, self._cursor
        before = streamed[cursor - 1] - (num_layers if cursor == 0 else 0)
        return self._sweep * num_layers + before, self._sweep * num_layers + streamed[cursor]

    def _advance(self) -> int:
        """The layer at the cursor, which moves on."""
        layer = self._streamed[self._cursor]
        self._cursor += 1
        if self._cursor == len(self._streamed):
            self._sweep, self._cursor = self._sweep + 1, 0
        return layer

    async def _prefetch(self, worker: Worker, buffer: torch.Tensor, freed: Event) -> Prefetched:
        restarts, (begin, end), layer = self._restarts, self._next_span(), self._advance()
        weights = self._weights.layers[layer]
        packed = weights.packed
        assert packed is not None  # only streamed layers are swept
        sent, loaded = 0, freed
        while sent < len(packed):
            share = (await self._bus.beyond(begin + (end - begin) * sent / len(packed)) - begin) / (end - begin)
            upto = min(len(packed), max(sent + _MIN_PART_BYTES, math.ceil(len(packed) * min(1.0, share))))
            loaded = await worker.run(partial(self._load, buffer[sent:upto], packed[sent:upto], loaded))
            sent = upto
        tensors, decodings = self._open(layer, buffer)
        return Prefetched(layer, tensors, buffer, loaded, restarts, decodings)

    def _open(self, layer: int, buffer: torch.Tensor) -> OpenedLayer:
        """A layer's weights in a buffer: opened once, for it takes long."""
        key = layer, buffer.data_ptr()
        if key not in self._made:
            self._made[key] = self._weights.layers[layer].open(buffer, self._decoded)
        return self._made[key]

    def _load(self, buffer: torch.Tensor, packed: torch.Tensor, after: Event) -> Event:
        device = self._device
        device.wait(device.load, after)
        with device.on(device.load):
            device.load_bytes(buffer, packed)
        self.streamed_bytes += len(packed)
        return device.record(device.load)
