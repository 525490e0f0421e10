"""Weights that a checkpoint has as codes with scales: they lie in host memory and cross the bus so, see `codes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch.nn import functional

from hsrpc.model.formats.codes import UNIT, CodedMatrix, CodedParts, decode
from hsrpc.model.formats.format import AsPublished, Encoded, Packing, Product, WeightSource, moved
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.fitted import CODES_BY_COLUMN_RATE_SHARE, CODES_RATE_SHARE, FEW_ROWS_RATE_SHARE
from hsrpc.plan.sizes import TensorSizes, align

FEW_ROWS = 4
"""Most rows that are multiplied by codes as they lie, where scales are found by units. On an H200 a weight takes 0.8 ps
(fp8: 1.0) for 4 rows where decoding it and reading what was written take 1.3, and 1.5 (1.6) for 8 rows
(products/few-rows.json).
"""
_ALIGNMENT = 16
"""Bytes; each source begins at a multiple."""


@dataclass(frozen=True, slots=True)
class ScaledPacking(Packing):
    """The sources of a tensor one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Element type of the operand."""
    sources: tuple[CodedMatrix, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(_aligned_bytes, self.sources))

    @property
    def decoded_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.view(self.dtype).view(self.shape)

    def fill(self, source: WeightSource, tensor: TensorSpec, data: torch.Tensor) -> None:
        source.read_codes(tensor, list(self.parts(data)), self.dtype)

    def parts(self, data: torch.Tensor) -> Iterator[CodedParts]:
        """Views of the parts of each source."""
        start = 0
        for source in self.sources:
            yield source.parts(data[start : start + source.num_bytes])
            start += _aligned_bytes(source)

    @property
    def few_rows(self) -> int:
        return 0 if any(source.finds_by_column or source.columns % UNIT for source in self.sources) else FEW_ROWS

    def product(self, data: torch.Tensor) -> Product:
        if data.is_cuda:
            from hsrpc.model.kernels.products import product  # loads Triton

            return product(self, data)
        return partial(_decode_and_multiply, self, data)

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]], moves: torch.Tensor | None = None) -> Callable[[], None]:
        if tensors[0].data.is_cuda:
            from hsrpc.model.kernels.scaled import decoding  # loads Triton

            return decoding(tensors, moves)
        return partial(decode_each, tensors, moves)


@dataclass(frozen=True, slots=True)
class Scaled(AsPublished):
    """Codes and scales as the checkpoint has them."""

    dtype: torch.dtype
    """What is computed in."""
    sources: tuple[CodedMatrix, ...]

    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        size, packed = align(tensor.numel * self.dtype.itemsize), align(self.packing(tensor).num_bytes)
        by_column = any(source.finds_by_column for source in self.sources)
        share = CODES_BY_COLUMN_RATE_SHARE if by_column else CODES_RATE_SHARE
        return TensorSizes(
            name=tensor.name,
            num_elements=tensor.numel,
            resident_bytes=tensor.numel * self.dtype.itemsize,
            device_bytes=size,
            buffer_bytes=packed,
            bus_bytes=packed,
            host_bytes=packed,
            decoded_bytes=size,
            decode_traffic=(packed + size) / share,
            few_rows=self.packing(tensor).few_rows,
            spared_traffic=(packed + size) / share + size - size / FEW_ROWS_RATE_SHARE,
        )

    def packing(self, tensor: TensorSpec) -> ScaledPacking:
        return ScaledPacking(tensor.shape, self.dtype, self.sources)

    def compile(self, device: torch.device) -> None:
        sources = tuple(_small(source) for source in self.sources)
        packing = ScaledPacking((sum(source.rows for source in sources), sources[0].columns), self.dtype, sources)
        data = torch.zeros(packing.num_bytes, dtype=torch.uint8, device=device)
        packing.decoding([Encoded(packing, data, torch.empty(packing.shape, dtype=self.dtype, device=device))])()
        multiply = packing.product(data)
        for rows in range(1, packing.few_rows + 1):
            multiply(torch.zeros((rows, packing.shape[1]), dtype=self.dtype, device=device), None)


def decode_each(tensors: Sequence[Encoded[ScaledPacking]], moves: torch.Tensor | None = None) -> None:
    """Write the operand of each that `moves` do not leave out."""
    for packing, data, operand, _ in moved(tensors, moves):
        rows = [source.rows for source in packing.sources]
        for parts, target in zip(packing.parts(data), operand.split(rows), strict=True):
            decode(parts, target)


def _decode_and_multiply(
    packing: ScaledPacking, data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `Packing.product`; for that time the tensor takes the memory that it is decoded to."""
    weight = torch.empty(packing.shape, dtype=packing.dtype, device=data.device)
    decode_each([Encoded(packing, data, weight)])
    return functional.linear(x, weight, bias)


def _aligned_bytes(source: CodedMatrix) -> int:
    return -(-source.num_bytes // _ALIGNMENT) * _ALIGNMENT


def _small(source: CodedMatrix) -> CodedMatrix:
    """A matrix with few rows that the same kernel decodes."""
    return replace(source, rows=min(source.rows, UNIT))
