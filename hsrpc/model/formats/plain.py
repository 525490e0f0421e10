"""Weights as they are computed with: nothing to pack, nothing to decode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hsrpc.model.formats.format import AsPublished, Packing
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import TensorSizes, align


@dataclass(frozen=True, slots=True)
class PlainPacking(Packing):
    """A tensor that lies in its bytes as it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Plain(AsPublished):
    """The values themselves, of one element type."""

    dtype: torch.dtype

    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        num_elements = tensor.numel
        size = align(num_elements * self.dtype.itemsize)
        return TensorSizes(
            name=tensor.name,
            num_elements=num_elements,
            resident_bytes=num_elements * self.dtype.itemsize,
            device_bytes=size,
            buffer_bytes=size,
            bus_bytes=size,
            host_bytes=size,
        )

    def packing(self, tensor: TensorSpec) -> Packing:
        return PlainPacking(tensor.shape, self.dtype)

    def compile(self, device: torch.device) -> None:
        """Nothing to compile."""
