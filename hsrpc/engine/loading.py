"""Weights from their source to where the plan wants them: on the device, or in pinned memory, packed by format."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch

from hsrpc.config import WeightCoding, format_bytes
from hsrpc.device.device import Device
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.device.host_pages import HostPages
from hsrpc.engine.weights import HostExperts, KeptTensor, LayerWeights, ModelWeights, PackedTensor, arrange
from hsrpc.errors import ConfigError, EngineUnavailableError
from hsrpc.model.family import Family
from hsrpc.model.formats.format import AsPublished, FromValues, Packing, WeightFormat, WeightSource
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.sizes import PlacedSizes, align

Progress: TypeAlias = Callable[[int, int], object]
"""Is told how many layers of how many are loaded, on the thread that loads them."""
_PACKED_AT_ONCE = 2
"""Layers that are packed on the device at once. Each takes its packed size of device memory meanwhile, and half of its
own or one tensor: together no more than the weight buffers, which are allocated later. Where nothing streams these are
the one that a layer is decoded to, which has room for one layer: what stays is moved to its place meanwhile."""
_MARGIN = 1.05
"""Host memory taken in advance for a layer that is being packed, over its expected size. What is left over goes back to
the system; what is missing is taken only when the size is known, which makes loading slower."""


class OverBoundError(ConfigError):
    """Packed weights take more than the bound of their format, which host memory was planned for."""


def compile_formats(family: Family, plan: Plan, device: Device) -> None:
    """Make the formats of the packed tensors ready: the threads that load would otherwise all compile the same."""
    formats: dict[WeightFormat, None] = {}
    for layer, stays in enumerate(plan.resident):
        packed = [tensor for tensor in family.layer_tensors(layer) if tensor.name not in stays.ready]
        formats |= dict.fromkeys(map(family.spec.formats.weight, packed))
    for each in formats:
        each.compile(device.torch_device)


def load_weights(
    family: Family,
    source: WeightSource,
    plan: Plan,
    device: Device,
    stop: threading.Event,
    *,
    group: DeviceGroup = ALONE,
    progress: Progress = lambda done, total: None,
) -> ModelWeights:
    """Read, convert, pin and place all weights, in parallel, since reading and pinning each use one core.

    Of what streams, one of a `group` of GPUs pins its part; of what is spread, it has its part on its device. Once
    `stop` is set, no further layer is begun.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        ConfigError: the host memory cannot be pinned.
        OverBoundError: packed weights take more than the bound of their format.
        EngineUnavailableError: it was stopped.
    """
    fixed, layers = family.fixed_tensors(), range(family.num_layers)
    with _threads() as pool, _threads() as packers:
        loader = _Loader(family, source, plan, device, stop, packers, group)
        read = pool.map(loader.fixed, fixed)
        coming, loaded = pool.map(loader.layer, layers), list[LayerWeights]()
        try:
            weights = {tensor.name: out for tensor, out in zip(fixed, read, strict=True)}
            for layer in coming:
                loaded.append(layer)
                progress(len(loaded), len(layers))
            return ModelWeights(weights, loaded)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error the rest is not read


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load")


@dataclass(slots=True)
class _Loader:
    """Loads layers, several at a time."""

    family: Family
    source: WeightSource
    plan: Plan
    device: Device
    stop: threading.Event
    packers: ThreadPoolExecutor
    """Read and pack the tensors of the layers that are being packed."""
    group: DeviceGroup
    _packing: threading.Semaphore = field(init=False)
    """Held while a layer takes device memory to be packed."""
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _taken: Counter[DeviceUse | HostUse] = field(default_factory=Counter)
    """Bytes that layers have taken so far, by use; of streamed ones those that were packed."""

    def __post_init__(self) -> None:
        self._packing = threading.Semaphore(_PACKED_AT_ONCE if any(self.plan.streamed_bytes) else 1)

    def fixed(self, tensor: TensorSpec) -> torch.Tensor:
        """A tensor that is no layer's, on the device."""
        return self._read(tensor, DeviceUse.FIXED)

    def _read(self, tensor: TensorSpec, use: DeviceUse) -> torch.Tensor:
        out = self.device.empty(tensor.shape, tensor.dtype(self.family.spec.dtype), use)
        self.source.read(tensor, out)
        return out

    def layer(self, number: int) -> LayerWeights:
        self._check_stop()
        demand, tensors = self.plan.demand, self.family.layer_tensors(number)
        names = self.family.expert_names(number)
        numbers = {name: expert for expert, each in enumerate(names) for name in each}
        if demand is None or not demand.counts[number]:
            return replace(self._others(number, tensors), numbers=numbers)
        by_name = {tensor.name: tensor for tensor in tensors}
        experts = [[by_name.pop(name) for name in each] for each in names]
        return replace(self._others(number, tuple(by_name.values())), experts=self._experts(experts), numbers=numbers)

    def _experts(self, experts: Sequence[Sequence[TensorSpec]]) -> HostExperts:
        """Experts that come on demand; all are alike, and packed as they are read."""
        parts: dict[str, tuple[int, PackedTensor]] = {}
        size = 0
        for number, tensors in enumerate(experts):
            placed, size = arrange(self._packings(tensors))
            parts |= {part.name: (number, part) for part in placed}

        def fill(memory: torch.Tensor) -> None:
            for tensor in (tensor for tensors in experts for tensor in tensors):
                number, part = parts[tensor.name]
                self._fill(tensor, part, memory.view(-1, size)[number])

        memory = self.device.pinned(len(experts) * size, HostUse.STREAMED_WEIGHTS, fill)
        return HostExperts(memory.view(-1, size), parts)

    def _others(self, number: int, tensors: Sequence[TensorSpec]) -> LayerWeights:
        """The weights that stay or stream."""
        stays = self.plan.resident[number]
        ready = {tensor.name: self._ready(tensor) for tensor in tensors if tensor.name in stays.ready}
        kept = self._keep([tensor for tensor in tensors if tensor.name in stays.packed])
        streamed = [tensor for tensor in tensors if tensor.name not in stays.names]
        if not streamed:
            return LayerWeights(ready, None, (), kept)
        packings, placed = self._packings(streamed), self.plan.placed[number]
        if len(packings) == len(streamed):
            parts, held = self._read_packed(streamed, packings, placed.spread_bytes)
        else:
            parts, held = self._pack(streamed, placed)
        return LayerWeights(ready, held.pinned, parts, kept, spread=held.spread)

    def _ready(self, tensor: TensorSpec) -> torch.Tensor:
        """A tensor that stays ready on the device."""
        values = self._read(tensor, DeviceUse.RESIDENT_WEIGHTS)
        self._count(DeviceUse.RESIDENT_WEIGHTS, values.nbytes)
        return self._format(tensor).place(values)

    def _keep(self, tensors: Sequence[TensorSpec]) -> tuple[KeptTensor, ...]:
        """Tensors that stay packed on the device."""
        packings = self._packings(tensors)
        if len(packings) == len(tensors):
            return tuple(self._read_kept(*each) for each in zip(tensors, packings, strict=True))
        with self._packing:
            self._check_stop()
            return tuple(kept for batch in _batches(tensors) for kept in self._pack_kept(batch))

    def _read_kept(self, tensor: TensorSpec, packing: tuple[str, Packing]) -> KeptTensor:
        kept = self._kept(*packing)
        self._fill(tensor, *kept)
        return kept

    def _pack_kept(self, tensors: Sequence[TensorSpec]) -> Iterator[KeptTensor]:
        packed = self.packers.map(self._pack_tensor, tensors)
        for tensor, (packing, data) in zip(tensors, packed, strict=True):
            kept = self._kept(tensor.name, packing)
            kept.part.data(kept.memory).copy_(data)
            yield kept

    def _kept(self, name: str, packing: Packing) -> KeptTensor:
        """Memory for a tensor that stays packed."""
        size = align(packing.num_bytes)
        self._count(DeviceUse.RESIDENT_WEIGHTS, size)
        memory = self.device.empty((size,), torch.uint8, DeviceUse.RESIDENT_WEIGHTS)
        return KeptTensor(PackedTensor(name, packing), memory)

    def _format(self, tensor: TensorSpec) -> WeightFormat:
        return self.family.spec.formats.weight(tensor)

    def _packings(self, tensors: Sequence[TensorSpec]) -> list[tuple[str, Packing]]:
        """Names of the tensors that are packed as they are read, and how."""
        known = ((tensor, self._format(tensor)) for tensor in tensors)
        return [(tensor.name, each.packing(tensor)) for tensor, each in known if isinstance(each, AsPublished)]

    def _read_packed(
        self, tensors: Sequence[TensorSpec], packings: Sequence[tuple[str, Packing]], spread: int
    ) -> tuple[tuple[PackedTensor, ...], _Held]:
        """Read tensors that are packed as they are read straight into the memory that is then pinned, or spread."""
        parts, size = arrange(packings)

        def fill(packed: torch.Tensor, start: int) -> None:
            end = start + len(packed)
            for tensor, part in zip(tensors, parts, strict=True):
                if start <= part.offset and part.end <= end:
                    self._fill(tensor, part.moved(-start), packed)
                elif start < part.end and part.offset < end:
                    whole = torch.empty(part.packing.num_bytes, dtype=torch.uint8)
                    part.packing.fill(self.source, tensor, whole)
                    _copy_between(packed, start, whole, part.offset)

        return parts, self._hold(self._split(size, spread), fill)

    def _fill(self, tensor: TensorSpec, part: PackedTensor, packed: torch.Tensor) -> None:
        part.packing.fill(self.source, tensor, part.data(packed))

    def _pack(self, tensors: Sequence[TensorSpec], placed: PlacedSizes) -> tuple[tuple[PackedTensor, ...], _Held]:
        """Read each tensor to the device and pack it there, but those on the host that are packed as they are read."""
        expected = math.ceil(placed.bus_bytes * _MARGIN)
        pages = self.device.pages(expected) if expected else None  # all threads at once, other than packing
        with self._packing:
            self._check_stop()  # again: others were packed meanwhile
            packed = [each for batch in _batches(tensors) for each in self.packers.map(self._pack_tensor, batch)]
            parts, size = arrange((each.name, packing) for each, (packing, _) in zip(tensors, packed, strict=True))

            def fill(memory: torch.Tensor, start: int) -> None:
                for part, (_, data) in zip(parts, packed, strict=True):
                    _copy_between(memory, start, data, part.offset)

            split = self._split(size, placed.spread_bytes)
            self._count(HostUse.STREAMED_WEIGHTS, split.end - split.start)
            return parts, self._hold(split, fill, pages)

    def _split(self, size: int, spread: int) -> _Split:
        """This GPU's parts of `size` bytes that come to a buffer, of which it is to hold `spread` on its device.

        Values decide how many bytes coded weights have: there may be fewer than planned, which then lie on the devices
        first.
        """
        spread = min(spread, self.group.part_bytes(size))
        first = self.group.size * spread
        start, end = self.group.part(max(0, size - first))
        return _Split(spread, first + start, first + end)

    def _hold(self, split: _Split, fill: Callable[[torch.Tensor, int], None], pages: HostPages | None = None) -> _Held:
        """Memory for this GPU's parts; `fill` writes its first argument, which lies in the layer from the second on."""
        spread, start, end = split
        held = self._held_on_device(spread, fill) if spread else None
        if start == end:
            return _Held(None, held)
        if pages is None:
            return _Held(self.device.pinned(end - start, HostUse.STREAMED_WEIGHTS, lambda out: fill(out, start)), held)
        pinned = self.device.pinned(end - start, HostUse.STREAMED_WEIGHTS, pages=pages)
        fill(pinned, start)
        return _Held(pinned, held)

    def _held_on_device(self, size: int, fill: Callable[[torch.Tensor, int], None]) -> torch.Tensor:
        self._count(DeviceUse.SPREAD_WEIGHTS, size)
        memory = self.device.empty((size,), torch.uint8, DeviceUse.SPREAD_WEIGHTS)
        fill(memory, self.group.rank * size)
        return memory

    def _pack_tensor(self, tensor: TensorSpec) -> tuple[Packing, torch.Tensor]:
        form = self._format(tensor)
        if isinstance(form, FromValues):
            return form.pack(self._read(tensor, DeviceUse.WEIGHT_BUFFERS))
        packing = form.packing(tensor)
        data = torch.empty(packing.num_bytes, dtype=torch.uint8)
        packing.fill(self.source, tensor, data)
        return packing, data

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise EngineUnavailableError("loading the model was stopped")

    def _count(self, use: DeviceUse | HostUse, size: int) -> None:
        """Add bytes for weights, before they are taken."""
        with self._counting:
            self._taken[use] += size
            taken = self._taken[use]
        planned = self.plan.device_bytes[use] if isinstance(use, DeviceUse) else self.plan.host_bytes[use]
        if taken > planned:
            problem = f"coded weights take more than the {format_bytes(planned)} planned"
            raise OverBoundError("weight_coding", WeightCoding.LOSSLESS.value, problem, "use weight_coding=none")


class _Split(NamedTuple):
    """Bytes of a layer that are a GPU's."""

    spread: int
    """Bytes that it holds on its device."""
    start: int
    """First byte that it loads, and end."""
    end: int


class _Held(NamedTuple):
    """A GPU's parts of what comes to a buffer."""

    pinned: torch.Tensor | None
    """uint8, in host memory; None: it loads none."""
    spread: torch.Tensor | None
    """uint8, on the device; None: nothing is spread."""


def _copy_between(target: torch.Tensor, first: int, source: torch.Tensor, offset: int) -> None:
    """Copy what overlaps of bytes that lie in a layer from `first` on, and from `offset` on."""
    start, end = max(first, offset), min(first + len(target), offset + len(source))
    if start < end:
        target[start - first : end - first].copy_(source[start - offset : end - offset])


def _batches(tensors: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Tensors that lie on the device at once, in order: half of all values at most, or a single tensor."""
    most, batch, size = sum(tensor.numel for tensor in tensors) // 2, list[TensorSpec](), 0
    for tensor in tensors:
        if batch and size + tensor.numel > most:
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.numel
    yield batch
