"""Codes with scales: how the weights of a matrix lie that takes fewer bits for each than it is computed in.

A weight is (code - zero) * scale, in float32, rounded once to the type that is computed in. A matrix has, row by row,

    codes     8 or 4 bits each; of 4 bits column 2i is the low half of byte i; a row is filled up to 8 codes
    scales    one for each block of rows x columns; those of blocks at an edge are of fewer
    zeros     uint8, one for each scale, where zero points differ
    groups    int32, the group of each column, where the columns of a group are no neighbours (GPTQ's act-order)
    factor    float32, a number that all scales are multiplied or divided by, before a weight is

Whatever layout a checkpoint has is brought to this one while it is loaded, see `hsrpc.model.quantization.reader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

import torch

UNIT = 8
"""Columns; each row has a multiple of so many codes."""
_ALIGNMENT = 16
"""Bytes; each part of a matrix begins at a multiple."""
_DECODED_AT_ONCE = 1 << 22
"""Weights: beside their operand they take 12 bytes each meanwhile."""


class Code(Enum):
    """What a code means, before zero point and scale."""

    E4M3 = "e4m3"
    """float8 with 4 bits of exponent (torch.float8_e4m3fn)"""
    E2M1 = "e2m1"
    """float4 with 2 bits of exponent: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives behind"""
    UINT8 = "uint8"
    UINT4 = "uint4"

    @property
    def bits(self) -> int:
        return 8 if self in (Code.E4M3, Code.UINT8) else 4

    @property
    def largest(self) -> float:
        """The largest number, without zero point."""
        return {Code.E4M3: 448.0, Code.E2M1: 6.0, Code.UINT8: 255.0, Code.UINT4: 15.0}[self]


class Factor(Enum):
    """What a number for all scales does to them."""

    MULTIPLIES = "multiplies"
    DIVIDES = "divides"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedMatrix:
    """How the codes of a matrix lie, and what goes with them."""

    rows: int
    columns: int
    code: Code
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    scale: torch.dtype = torch.float32
    """Element type of the scales: float32, float16, bfloat16, float8_e8m0fnu, or float8_e4m3fn."""
    zero: int | None = 0
    """Zero point of all weights; None: each scale has one of its own."""
    has_groups: bool = False
    """Columns of a group are no neighbours: a table names the group of each."""
    factor: Factor | None = None
    """What a number for all scales does; None: there is none."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def grid(self) -> tuple[int, int]:
        """Scales along each dimension."""
        return grid(self.shape, self.block)

    @property
    def finds_by_column(self) -> bool:
        """Whether the scale of each column is found by itself, which takes longer: those of a unit may have several.

        Or the rows or columns of a block are no power of two, so that it is not found by a shift.
        """
        are_powers = all(map(_is_power, self.block, self.shape))
        return self.has_groups or not are_powers or self.block[1] < min(UNIT, self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes, filled up."""
        return -(-self.columns // UNIT) * UNIT * self.code.bits // 8

    @property
    def used_bytes(self) -> int:
        """Bytes of a row of codes, without what it is filled up with."""
        return -(-self.columns * self.code.bits // 8)

    @property
    def num_bytes(self) -> int:
        return self._bounds()[-1][1]

    def parts(self, data: torch.Tensor) -> CodedParts:
        """Views of the matrix's bytes `data` (uint8)."""
        codes, scales, zeros, groups, factor = (data[start:end] for start, end in self._bounds())
        return CodedParts(
            self,
            codes.view(self.rows, self.row_bytes)[:, : self.used_bytes],
            scales.view(self.scale).view(self.grid),
            zeros.view(self.grid) if self.zero is None else None,
            groups.view(torch.int32) if self.has_groups else None,
            factor.view(torch.float32) if self.factor is not None else None,
        )

    def _bounds(self) -> list[tuple[int, int]]:
        """First byte and end of each part, in the order of `CodedParts`."""
        count = self.grid[0] * self.grid[1]
        zeros, groups, factor = self.zero is None, self.has_groups, self.factor is not None
        sizes = (
            self.rows * self.row_bytes,
            count * self.scale.itemsize,
            count if zeros else 0,
            4 * self.columns if groups else 0,
            4 if factor else 0,
        )
        starts = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
        return [(start, start + size) for start, size in zip(starts, sizes, strict=False)]


class CodedParts(NamedTuple):
    """The parts of a matrix, to be filled or read."""

    matrix: CodedMatrix
    codes: torch.Tensor
    """uint8 [rows, `CodedMatrix.used_bytes`]; rows are strided where they are filled up"""
    scales: torch.Tensor
    """Numbers of the scales' own type, as many as `CodedMatrix.grid` says"""
    zeros: torch.Tensor | None
    """uint8, one for each scale"""
    groups: torch.Tensor | None
    """int32 [columns]"""
    factor: torch.Tensor | None
    """float32 [1]"""


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix of that `shape` along each dimension; the last ones may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _is_power(block: int, size: int) -> bool:
    return block >= size or not block & (block - 1)


def scales_of(parts: CodedParts) -> torch.Tensor:
    """What weights are multiplied by: float32, as many as `CodedMatrix.grid` says."""
    scales = parts.scales.float()
    if parts.factor is None:
        return scales
    return scales * parts.factor if parts.matrix.factor is Factor.MULTIPLIES else scales / parts.factor


def decode(parts: CodedParts, target: torch.Tensor) -> None:
    """Write the weights to `target` [rows, columns], on the device of their parts."""
    matrix, scales = parts.matrix, scales_of(parts)
    height = max(1, _DECODED_AT_ONCE // matrix.columns)
    zeros = None if parts.zeros is None else parts.zeros.float()
    for first, codes in zip(range(0, matrix.rows, height), parts.codes.split(height), strict=True):
        rows = torch.arange(first, first + len(codes), device=codes.device) // matrix.block[0]
        values = _values(matrix, codes)
        if zeros is not None:
            values -= _spread(parts, zeros[rows])
        elif matrix.zero:
            values -= matrix.zero
        target[first : first + height].copy_(values.mul_(_spread(parts, scales[rows])))


def _values(matrix: CodedMatrix, codes: torch.Tensor) -> torch.Tensor:
    """Numbers of rows of codes, without zero points and scales: float32 [n, columns]."""
    if matrix.code is Code.E4M3:
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    if matrix.code is Code.UINT8:
        return codes.float()
    halves = torch.stack((codes & 15, codes >> 4), dim=2).view(len(codes), -1)[:, : matrix.columns]
    return halves.float() if matrix.code is Code.UINT4 else _e2m1(codes.device)[halves.int()]


def _e2m1(device: torch.device) -> torch.Tensor:
    """Numbers that codes of four bits mean: float32 [16]."""
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat((sizes, -sizes)).to(device)


def _spread(parts: CodedParts, numbers: torch.Tensor) -> torch.Tensor:
    """What rows have for each group of columns, for each column: [n, columns], or [n, 1] where all share one."""
    if parts.groups is not None:
        return numbers[:, parts.groups]
    if numbers.shape[1] == 1:
        return numbers
    return numbers.repeat_interleave(parts.matrix.block[1], 1)[:, : parts.matrix.columns]
