"""Weights that a checkpoint has as float8 codes (e4m3) with scales: they lie in host memory and cross the bus so.

A weight is its code times its scale, a product in float32, rounded to the type that is computed in. A packed tensor has

    codes     [rows, columns], a byte each, of all its sources one after the other
    scales    float32, of each source a matrix: one for each block of its weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch

from hsrpc.model.formats.format import Encoded, Packing, WeightFormat
from hsrpc.model.quantization import grid
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.fitted import DECODE_RATE_SHARE
from hsrpc.plan.sizes import TensorSizes, align

CODES = torch.float8_e4m3fn
_ALIGNMENT = 16
"""Bytes; the scales begin at a multiple."""
_DECODED_AT_ONCE = 1 << 22
"""Weights: beside their operand they take 8 bytes each meanwhile."""


@dataclass(frozen=True, slots=True)
class ScaledSource:
    """A weight of the checkpoint that has scales."""

    rows: int
    columns: int
    block: tuple[int, int]
    """Rows and columns that share a scale; blocks at the edges may be smaller."""
    scales: str
    """Name of their tensor in the checkpoint."""
    scales_shape: tuple[int, ...]
    """Its shape there."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def grid(self) -> tuple[int, int]:
        """Scales along each dimension."""
        return grid(self.shape, self.block)


@dataclass(frozen=True, slots=True)
class ScaledPacking(Packing):
    """How codes and scales lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Element type of the operand."""
    sources: tuple[ScaledSource, ...]

    @property
    def num_bytes(self) -> int:
        return self._first_scale + 4 * sum(math.prod(source.grid) for source in self.sources)

    @property
    def decoded_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _first_scale(self) -> int:
        return -(-math.prod(self.shape) // _ALIGNMENT) * _ALIGNMENT

    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.view(self.dtype).view(self.shape)

    def contents(self, tensor: TensorSpec, data: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        yield tensor, self.codes(data)
        for source, scales in zip(self.sources, self.scales(data), strict=True):
            spec = TensorSpec(f"{tensor.name} scales", source.scales_shape, (source.scales,), exact=True)
            yield spec, scales.view(source.scales_shape)

    def codes(self, data: torch.Tensor) -> torch.Tensor:
        """Those of all sources: float8 [rows, columns]."""
        return data[: math.prod(self.shape)].view(CODES).view(self.shape)

    def scales(self, data: torch.Tensor) -> Iterator[torch.Tensor]:
        """Those of each source: float32, a matrix."""
        flat, start = data[self._first_scale : self.num_bytes].view(torch.float32), 0
        for source in self.sources:
            count = math.prod(source.grid)
            yield flat[start : start + count].view(source.grid)
            start += count

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]]) -> Callable[[], None]:
        if tensors[0].data.is_cuda:
            from hsrpc.model.kernels.scaled import ScaledDecoder  # loads Triton

            return ScaledDecoder.of(tensors).run
        return partial(decode_each, tensors)


@dataclass(frozen=True, slots=True)
class Scaled(WeightFormat):
    """Codes and scales as the checkpoint has them; a tensor that stays on the device is decoded when it is loaded.

    Decoding is counted at the rate of coded weights, which takes more than this: it is not measured yet.
    """

    dtype: torch.dtype
    """What is computed in."""
    sources: tuple[ScaledSource, ...]

    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        size, packed = align(tensor.numel * self.dtype.itemsize), align(self.packing(tensor).num_bytes)
        return TensorSizes(
            name=tensor.name,
            num_elements=tensor.numel,
            resident_bytes=tensor.numel * self.dtype.itemsize,
            device_bytes=size,
            buffer_bytes=packed,
            bus_bytes=packed,
            host_bytes=packed,
            decoded_bytes=size,
            decode_traffic=(packed + size) / DECODE_RATE_SHARE,
        )

    def pack(self, values: torch.Tensor) -> tuple[Packing, torch.Tensor]:
        """Raises NotImplementedError: codes come from the checkpoint, see `packing`."""
        raise NotImplementedError("scaled weights are read as the checkpoint has them")

    def packing(self, tensor: TensorSpec) -> ScaledPacking:
        return ScaledPacking(tensor.shape, self.dtype, self.sources)

    def compile(self, device: torch.device) -> None:
        source = ScaledSource(_ALIGNMENT, _ALIGNMENT, (_ALIGNMENT, _ALIGNMENT), "", ())
        packing = ScaledPacking(source.shape, self.dtype, (source,))
        data = torch.zeros(packing.num_bytes, dtype=torch.uint8, device=device)
        packing.decoding([Encoded(packing, data, torch.empty(source.shape, dtype=self.dtype, device=device))])()


def decode(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], target: torch.Tensor) -> None:
    """Write codes (float8 [rows, columns]) times their blocks' scales (float32) to `target`, of the same shape."""
    height = max(1, _DECODED_AT_ONCE // codes.shape[1])
    for first, part in zip(range(0, len(codes), height), codes.split(height), strict=True):
        rows = torch.arange(first, first + len(part), device=codes.device) // block[0]
        factors = scales[rows]
        if scales.shape[1] > 1:
            factors = factors.repeat_interleave(block[1], 1)[:, : codes.shape[1]]
        target[first : first + height].copy_(part.float().mul_(factors))


def decode_each(tensors: Sequence[Encoded[ScaledPacking]]) -> None:
    """Write the operand of each."""
    for packing, data, operand in tensors:
        rows = [source.rows for source in packing.sources]
        codes = packing.codes(data).split(rows)
        for source, part, scales, target in zip(
            packing.sources, codes, packing.scales(data), operand.split(rows), strict=True
        ):
            decode(part, scales, source.block, target)
