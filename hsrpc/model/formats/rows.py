"""How the numbers of a token lie in a row of a block and of a buffer: as they are, or as codes of 8 bits with scales.

A coded row has

    codes     a byte for each number, in the order of the numbers; padding to a multiple of 4 bytes
    scales    bfloat16: for each head one of each of its parts (its key and its value), together
    padding   to a multiple of 16 bytes

and means code times scale. Of the numbers x that share a scale it is max|x| / (the largest code), rounded up to
bfloat16; codes are x / scale, rounded to the nearest, to even ones where two are as near.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from hsrpc.plan.sizes import CacheRow

ROW_ALIGNMENT = 16
"""Bytes; coded rows take a multiple, so that they are read so many at once."""
MIN_SCALE = 2.0**-126
"""What numbers that are all 0, or next to it, have as a scale: its reciprocal is finite."""
_SCALE_BYTES, _WORD = 2, 4

CopyRows: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`target[target_rows] = source[source_rows]`, in this order of arguments; row numbers are int64 [n]."""


class RowShape(NamedTuple):
    """The numbers of a row: its parts one behind the other, each of as many heads of a width of its own."""

    heads: int
    widths: tuple[int, ...]
    """Numbers of one head in each part; all that share a scale."""

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.heads * sum(self.widths)

    @property
    def num_scales(self) -> int:
        return self.heads * len(self.widths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First number of each part, then the end."""
        return tuple(accumulate((self.heads * width for width in self.widths), initial=0))


class Codes(Enum):
    """What a code of 8 bits may be; the value is its name for people."""

    FP8 = "fp8"
    """float8, e4m3: errors in proportion to each number."""
    INT8 = "int8"
    """-127 to 127: errors in proportion to the largest number that shares the scale."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self is Codes.FP8 else torch.int8

    @property
    def largest(self) -> float:
        """The largest code."""
        return 448.0 if self is Codes.FP8 else 127.0


@dataclass(frozen=True, slots=True)
class Rows(ABC):
    """The rows of a kind of block, and of the buffers that these are copied to: [*, columns] of `dtype`."""

    shape: RowShape
    """The numbers of a row."""
    computed: torch.dtype
    """Type that is computed in."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Element type of pools and buffers."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Elements of a row there."""

    @property
    def size(self) -> CacheRow:
        """What a row takes, for planning."""
        return CacheRow(self.shape.width, self.columns * self.dtype.itemsize)

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Rows [n, columns] of values [n, width]."""

    @abstractmethod
    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """What rows [n, columns] mean: [n, width], of the type that is computed in."""

    @abstractmethod
    def put(self, target: torch.Tensor, target_rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write values [n, width] as the rows int64 [n] of `target` [*, columns]."""

    @abstractmethod
    def writer(self, copy: CopyRows) -> CopyRows:
        """What writes some rows of values [*, width] as rows of a target [*, columns]; `copy` copies rows as they are.

        The target may be pinned memory.
        """


@dataclass(frozen=True, slots=True)
class ValueRows(Rows):
    """The numbers themselves, in the type that is computed in."""

    @property
    def dtype(self) -> torch.dtype:
        return self.computed

    @property
    def columns(self) -> int:
        return self.shape.width

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def put(self, target: torch.Tensor, target_rows: torch.Tensor, values: torch.Tensor) -> None:
        target.index_copy_(0, target_rows, values)

    def writer(self, copy: CopyRows) -> CopyRows:
        return copy


@dataclass(frozen=True, slots=True)
class CodedRows(Rows):
    """Codes and scales, as bytes."""

    codes: Codes

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def columns(self) -> int:
        return _aligned(self.first_scale + _SCALE_BYTES * self.shape.num_scales, ROW_ALIGNMENT)

    @property
    def first_scale(self) -> int:
        """Byte at which the scales begin: those of a head are read as one word."""
        return _aligned(self.shape.width, _WORD)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        rows = torch.empty((len(values), self.columns), dtype=self.dtype, device=values.device)
        self.encode_into(rows, values)
        return rows

    def encode_into(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write values [n, width] to rows [n, columns]; the padding stays as it is."""
        if values.is_cuda:
            from hsrpc.model.kernels import rows as kernels  # loads Triton

            kernels.encode(self, rows, values)
            return
        codes, scales = self.parts(rows)
        for part, (x, code) in enumerate(zip(self._groups(values), self._groups(codes), strict=True)):
            scale = scale_of(x, self.codes)
            code.copy_(quantise(x, scale, self.codes))
            scales[..., part] = scale

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.is_cuda:
            from hsrpc.model.kernels import rows as kernels  # loads Triton

            return kernels.decode(self, rows)
        codes, scales = self.parts(rows)
        values = torch.empty(codes.shape, dtype=self.computed, device=rows.device)
        for part, (code, x) in enumerate(zip(self._groups(codes), self._groups(values), strict=True)):
            x.copy_(code.float() * scales[..., part, None].float())
        return values

    def put(self, target: torch.Tensor, target_rows: torch.Tensor, values: torch.Tensor) -> None:
        if values.is_cuda:
            from hsrpc.model.kernels import rows as kernels  # loads Triton

            kernels.encode(self, target, values, target_rows=target_rows)
        else:
            target.index_copy_(0, target_rows, self.encode(values))

    def writer(self, copy: CopyRows) -> CopyRows:
        return self.write

    def write(
        self, target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor
    ) -> None:
        """Write the values in `source_rows` of `source` [*, width] as `target_rows` of `target` [*, columns]."""
        if source.is_cuda:
            from hsrpc.model.kernels import rows as kernels  # loads Triton

            kernels.encode(self, target, source, target_rows=target_rows, source_rows=source_rows)
        else:
            self.put(target, target_rows, source.index_select(0, source_rows))

    def parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [n, width] and scales bfloat16 [n, heads, parts] of rows, as views."""
        first, shape = self.first_scale, self.shape
        scales = rows[:, first : first + _SCALE_BYTES * shape.num_scales].view(torch.bfloat16)
        return rows[:, : shape.width].view(self.codes.dtype), scales.unflatten(1, (shape.heads, len(shape.widths)))

    def _groups(self, numbers: torch.Tensor) -> Iterator[torch.Tensor]:
        """The parts of [n, width], each as a view [n, heads, its width]."""
        starts = self.shape.starts
        for start, end, width in zip(starts, starts[1:], self.shape.widths, strict=False):
            yield numbers[:, start:end].unflatten(1, (self.shape.heads, width))


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def scale_of(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Scales of numbers that share one in the last dimension, in float32: bfloat16 values, rounded up."""
    exact = x.float().abs().amax(-1) / codes.largest  # a product with 1 / largest would not give back a scale
    bits = (exact.view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32).clamp_min_(MIN_SCALE)


def quantise(x: torch.Tensor, scale: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Codes of x [..., w], for the scales [...] of its last dimension."""
    scaled = x.float() * scale.reciprocal()[..., None]
    return (scaled if codes is Codes.FP8 else scaled.round_()).to(codes.dtype)
