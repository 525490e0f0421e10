"""A Triton kernel that decodes weights with scales: the same bits as `scaled.decode`.

Codes are taken apart as whole numbers, so that it runs where the hardware has no float8 too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl

from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking

_ROWS, _COLUMNS = 16, 256
"""Size of a program's tile."""
_GROUP = 16
"""Programs that are of one matrix for sure: one word says for all of them which."""
_ALIGNED = 16
"""Bytes; where rows have a multiple of as many codes, they are read and written so many at once."""
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointer(fields, number: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in that field: a multiple of so many bytes."""
    return tl.multiple_of(tl.load(fields + number).to(tl.pointer_type(dtype)), ALIGNED)


@triton.jit
def _number(fields, number: tl.constexpr):
    return tl.load(fields + number).to(tl.int32)


@triton.jit
def _value(code):
    """What an e4m3 code means, float32: 1 bit is the sign, 4 the exponent (bias 7), 3 the mantissa; 0x7F is NaN."""
    code = code.to(tl.int32)
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    found = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    found = tl.where(size == 0x7F, float("nan"), found)
    return tl.where(code >= 0x80, -found, found)


@triton.jit
def _decode_scaled(
    matrices,
    groups,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A program decodes a tile of the matrix that `groups` names, by its row of `matrices` [*, FIELDS]."""
    program = tl.program_id(0)
    fields = matrices + tl.load(groups + program // GROUP) * FIELDS
    target = _pointer(fields, 1, DTYPE, ALIGNED)
    codes = _pointer(fields, 2, tl.uint8, ALIGNED)
    scales = _pointer(fields, 3, tl.float32, 4)
    num_rows = _number(fields, 4)
    num_columns = tl.multiple_of(_number(fields, 5), ALIGNED)
    across = tl.cdiv(num_columns, COLUMNS)
    tile = program - _number(fields, 0)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    where = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    block = (row // _number(fields, 6) * _number(fields, 8))[:, None] + (column // _number(fields, 7))[None, :]
    value = _value(tl.load(codes + where, mask=inside, other=0)) * tl.load(scales + block, mask=inside, other=0.0)
    tl.store(target + where, value.to(DTYPE), mask=inside)


@dataclass(frozen=True, slots=True)
class ScaledDecoder:
    """Decodes several tensors of one element type in one launch, again and again."""

    encoded: Sequence[Encoded[ScaledPacking]]
    """They keep the memory whose addresses the table has."""
    matrices: torch.Tensor
    """int64 [sources of all tensors, fields], as `_decode_scaled` reads them, on the device."""
    groups: torch.Tensor
    """int32 [groups]: the matrix of each group of programs, on the device."""
    dtype: torch.dtype
    aligned: int

    @classmethod
    def of(cls, tensors: Sequence[Encoded[ScaledPacking]]) -> ScaledDecoder:
        """Made once for the memory that they lie in; the host waits for the current stream."""
        [dtype] = {each.packing.dtype for each in tensors}
        device = tensors[0].data.device
        matrices = [fields for each in tensors for fields in _fields(each)]
        counts = [-(-_tiles(*fields[3:5]) // _GROUP) for fields in matrices]
        firsts = accumulate(counts, initial=0)
        table = [[first * _GROUP, *fields] for first, fields in zip(firsts, matrices, strict=False)]
        groups = torch.arange(len(matrices), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        are_aligned = all(number % _ALIGNED == 0 for fields in matrices for number in (*fields[:2], fields[4]))
        aligned = _ALIGNED if are_aligned else 1
        return cls(tensors, torch.tensor(table).to(device), groups.to(device), dtype, aligned)

    def run(self) -> None:
        """As `scaled.decode` of each, on the current stream."""
        _decode_scaled[(len(self.groups) * _GROUP,)](
            self.matrices,
            self.groups,
            DTYPE=_TYPES[self.dtype],
            ALIGNED=self.aligned,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            GROUP=_GROUP,
            FIELDS=self.matrices.shape[1],
            num_warps=4,
        )


def _tiles(rows: int, columns: int) -> int:
    return -(-rows // _ROWS) * -(-columns // _COLUMNS)


def _fields(encoded: Encoded[ScaledPacking]) -> Iterator[list[int]]:
    """A row of the table that the kernel reads, without its first field, for each of a tensor's matrices."""
    packing, data, operand = encoded
    first = 0
    codes = packing.codes(data)
    for source, scales in zip(packing.sources, packing.scales(data), strict=True):
        addresses = (each.data_ptr() for each in (operand[first:], codes[first:], scales))
        yield [*addresses, *source.shape, *source.block, source.grid[1]]
        first += source.rows
