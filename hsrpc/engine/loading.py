"""Weights from their source to where the plan wants them: on the device, or packed in pinned memory, coded or not."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tqdm import tqdm

from hsrpc.config import WeightCoding, format_bytes
from hsrpc.device.device import Device
from hsrpc.engine.weights import CodedSlice, LayerWeights, ModelWeights, Slice, views
from hsrpc.errors import ConfigError, EngineUnavailableError
from hsrpc.model.checkpoint import WeightSource
from hsrpc.model.family import Family, TensorSpec
from hsrpc.model.formats.lossless import WORD, can_encode
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.sizes import align

_CODED_AT_ONCE = 2
"""Layers: each takes its own size of device memory meanwhile, less than the weight buffers that are allocated later."""
_MARGIN = 1.05
"""Of the pages for coded weights over what is expected: too many go back at once, too few come late."""


class HardlySmallerError(ConfigError):
    """Coded weights take more than was planned: matrices are small, or their exponents differ a lot."""


def compile_coding(device: Device, dtype: torch.dtype) -> None:
    """Code and decode a few values: the threads that load would otherwise all compile the same kernels."""
    values = device.empty((1, WORD), dtype, DeviceUse.WORKSPACE)
    values.copy_(torch.arange(WORD))  # of six exponents, for which the second level is needed
    coding, data = device.encode_weights(values)
    device.decode_weights(data, coding, values)


def load_weights(
    family: Family, source: WeightSource, plan: Plan, device: Device, stop: threading.Event, *, progress: bool = False
) -> ModelWeights:
    """Read, convert, pin and place all weights, in parallel, since reading and pinning each use one core.

    Once `stop` is set, no further layer is begun.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        ConfigError: the host memory cannot be pinned.
        HardlySmallerError: as its name says.
        EngineUnavailableError: it was stopped.
    """
    loader = _Loader(family, source, plan, device, stop)
    fixed, layers = family.fixed_tensors(), range(family.sizes.num_layers)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        read = pool.map(loader.fixed, fixed)
        loaded = pool.map(loader.layer, layers)
        bar = tqdm(loaded, total=len(layers), desc="loading weights", unit="layer", disable=not progress, leave=False)
        try:
            return ModelWeights({tensor.name: out for tensor, out in zip(fixed, read, strict=True)}, list(bar))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error the rest is not read


@dataclass(slots=True)
class _Loader:
    """Loads layers, several at a time."""

    family: Family
    source: WeightSource
    plan: Plan
    device: Device
    stop: threading.Event
    _coding: threading.Semaphore = field(default_factory=partial(threading.Semaphore, _CODED_AT_ONCE))
    """Held while a layer takes device memory to be coded."""
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _num_coded: int = 0
    """Bytes of all layers coded so far."""

    def fixed(self, tensor: TensorSpec) -> torch.Tensor:
        """A tensor that is no layer's, on the device."""
        return self._read(tensor, DeviceUse.FIXED)

    def _read(self, tensor: TensorSpec, use: DeviceUse) -> torch.Tensor:
        out = self.device.empty(tensor.shape, self.family.spec.dtype, use)
        self.source.read(tensor, out)
        return out

    def layer(self, number: int) -> LayerWeights:
        self._check_stop()
        tensors, stays = self.family.layer_tensors(number), self.plan.resident[number]
        resident = {t.name: self._read(t, DeviceUse.RESIDENT_WEIGHTS) for t in tensors if t.name in stays}
        streamed = [tensor for tensor in tensors if tensor.name not in stays]
        if not streamed:
            return LayerWeights(resident, None, (), self.family.spec.dtype)
        return replace(self._coded(streamed) if self.plan.codes_weights else self._packed(streamed), resident=resident)

    def _packed(self, tensors: Sequence[TensorSpec]) -> LayerWeights:
        slices, size = _pack(tensors, self.family.spec.dtype)

        def fill(packed: torch.Tensor) -> None:
            host = views(packed, slices, self.family.spec.dtype)
            for tensor in tensors:
                self.source.read(tensor, host[tensor.name])

        packed = self.device.pinned(size, HostUse.STREAMED_WEIGHTS, fill)
        return LayerWeights({}, packed, slices, self.family.spec.dtype)

    def _coded(self, tensors: Sequence[TensorSpec]) -> LayerWeights:
        """Matrices are coded, on the device; other tensors are small, and stay as they are."""
        slices: list[Slice] = []
        coded: list[CodedSlice] = []
        parts: list[tuple[int, torch.Tensor]] = []
        size = target = 0
        pages = self.device.pages(self._expected_bytes(tensors))  # all threads at once, other than coding
        with self._coding:
            self._check_stop()  # again: others were coded meanwhile
            for tensor in tensors:
                values = self._read(tensor, DeviceUse.WEIGHT_BUFFERS)  # in their room
                if can_encode(values):
                    coding, data = self.device.encode_weights(values)
                    coded.append(CodedSlice(tensor.name, coding, size, target))
                    target += align(values.nbytes)
                else:
                    data = values.view(torch.uint8)
                    slices.append(Slice(tensor.name, tensor.shape, size))
                parts.append((size, data))
                size += align(len(data))
            self._count(size)
            packed = self.device.pinned(size, HostUse.STREAMED_WEIGHTS, pages=pages)
            for start, data in parts:
                packed[start : start + len(data)] = data
        return LayerWeights({}, packed, tuple(slices), self.family.spec.dtype, tuple(coded))

    def _expected_bytes(self, tensors: Sequence[TensorSpec]) -> int:
        """Of coded tensors, and a little more."""
        sizes = self.family.sizes
        return math.ceil(sum(sizes.tensor_bytes(tensor.name) for tensor in tensors) * sizes.coded_share * _MARGIN)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise EngineUnavailableError("loading the model was stopped")

    def _count(self, size: int) -> None:
        """Of a coded layer, before it is pinned."""
        with self._counting:
            self._num_coded += size
        planned = self.plan.host_bytes[HostUse.STREAMED_WEIGHTS]
        if self._num_coded > planned:
            problem = f"coded weights take more than the {format_bytes(planned)} planned"
            raise HardlySmallerError("weight_coding", WeightCoding.LOSSLESS.value, problem, "use weight_coding=none")


def _pack(tensors: Sequence[TensorSpec], dtype: torch.dtype) -> tuple[tuple[Slice, ...], int]:
    """Slices one behind the other, each aligned, and the bytes they take."""
    slices, offset = [], 0
    for tensor in tensors:
        slices.append(Slice(tensor.name, tensor.shape, offset))
        offset += align(math.prod(tensor.shape) * dtype.itemsize)
    return tuple(slices), offset
