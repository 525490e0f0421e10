"""Layer weights: a part resident on the device, the rest in one pinned buffer a layer, prefetched as a whole."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from hsrpc.core.plan import BUFFERS, Plan
from hsrpc.core.sizes import align
from hsrpc.device.device import Device, Event
from hsrpc.engine.bus import BusOrder
from hsrpc.engine.worker import Worker
from hsrpc.errors import EngineUnavailableError
from hsrpc.model.checkpoint import WeightSource
from hsrpc.model.family import Family, TensorSpec

_LEAST_BYTES = 16 * 1024**2
"""Of one part of a layer's weights: smaller copies waste the bus."""


class _Slice(NamedTuple):
    """A tensor within a packed buffer of bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer."""

    resident: Mapping[str, torch.Tensor]
    packed: torch.Tensor | None
    """Pinned bytes of the tensors that are streamed; None where none is."""
    slices: tuple[_Slice, ...]
    dtype: torch.dtype

    def on(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors of the layer, given the device buffer (bytes) that holds a copy of `packed`."""
        return {**self.resident, **views(buffer, self.slices, self.dtype)}


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model, where the plan wants them."""

    fixed: Mapping[str, torch.Tensor]
    layers: Sequence[LayerWeights]


def views(buffer: torch.Tensor, slices: Sequence[_Slice], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in a buffer of bytes."""
    return {s.name: _view(buffer, s, dtype) for s in slices}


def _view(buffer: torch.Tensor, s: _Slice, dtype: torch.dtype) -> torch.Tensor:
    size = math.prod(s.shape) * dtype.itemsize
    return buffer[s.offset : s.offset + size].view(dtype).view(s.shape)


def load_weights(
    family: Family, source: WeightSource, plan: Plan, device: Device, stop: threading.Event, *, progress: bool = False
) -> ModelWeights:
    """Read, convert, pin and place all weights, in parallel, since reading and pinning each use one core.

    Once `stop` is set, no further layer is begun.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        ConfigError: the host memory cannot be pinned.
        EngineUnavailableError: it was stopped.
    """

    def load(layer: int) -> LayerWeights:
        if stop.is_set():
            raise EngineUnavailableError("loading the model was stopped")
        return _load_layer(family, source, plan, device, layer)

    fixed, layers = family.fixed_tensors(), range(family.sizes.num_layers)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        read = pool.map(lambda tensor: _read(tensor, source, device, family.spec.dtype), fixed)
        loaded = pool.map(load, layers)
        bar = tqdm(loaded, total=len(layers), desc="loading weights", unit="layer", disable=not progress, leave=False)
        try:
            return ModelWeights({tensor.name: out for tensor, out in zip(fixed, read, strict=True)}, list(bar))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error the rest is not read


def _load_layer(family: Family, source: WeightSource, plan: Plan, device: Device, layer: int) -> LayerWeights:
    dtype = family.spec.dtype
    tensors = family.layer_tensors(layer)
    stays = plan.resident[layer]
    resident = {t.name: _read(t, source, device, dtype) for t in tensors if t.name in stays}
    streamed = [t for t in tensors if t.name not in stays]
    slices, size = _pack(streamed, dtype)
    if not streamed:
        return LayerWeights(resident, None, (), dtype)

    def fill(packed: torch.Tensor) -> None:
        host = views(packed, slices, dtype)
        for tensor in streamed:
            source.read(tensor, host[tensor.name])

    return LayerWeights(resident, device.pinned(size, fill), slices, dtype)


def _read(tensor: TensorSpec, source: WeightSource, device: Device, dtype: torch.dtype) -> torch.Tensor:
    out = device.empty(tensor.shape, dtype)
    source.read(tensor, out)
    return out


def _pack(tensors: Sequence[TensorSpec], dtype: torch.dtype) -> tuple[tuple[_Slice, ...], int]:
    """Slices one behind the other, each aligned, and the bytes they take."""
    slices, offset = [], 0
    for tensor in tensors:
        slices.append(_Slice(tensor.name, tensor.shape, offset))
        offset += align(math.prod(tensor.shape) * dtype.itemsize)
    return tuple(slices), offset


class Prefetched(NamedTuple):
    """Weights of a layer on the device once `loaded` has happened."""

    layer: int
    tensors: Mapping[str, torch.Tensor]
    buffer: torch.Tensor | None
    """Goes back with `WeightPrefetcher.give_back`; None for a layer that is resident."""
    loaded: Event
    restarts: int


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
        packed = self._weights.layers[layer].packed
        assert packed is not None  # only streamed layers are swept
        sent, loaded = 0, freed
        while sent < len(packed):
            share = (await self._bus.beyond(begin + (end - begin) * sent / len(packed)) - begin) / (end - begin)
            upto = min(len(packed), max(sent + _LEAST_BYTES, math.ceil(len(packed) * min(1.0, share))))
            loaded = await worker.run(partial(self._load, buffer[sent:upto], packed[sent:upto], loaded))
            sent = upto
        return Prefetched(layer, self._weights.layers[layer].on(buffer), buffer, loaded, restarts)

    def _load(self, buffer: torch.Tensor, packed: torch.Tensor, after: Event) -> Event:
        device = self._device
        device.wait(device.load, after)
        with device.on(device.load):
            device.load_bytes(buffer, packed)
        self.streamed_bytes += len(packed)
        return device.record(device.load)
