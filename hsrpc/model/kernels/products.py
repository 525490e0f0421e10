"""A Triton kernel that multiplies a few rows by codes with scales, as these lie: nothing is decoded to memory.

Weights are rounded as by `kernels.scaled`, which says what codes mean, and sums are of float32. A program takes a few
output channels, and its threads share their columns: so even one row fills the machine, each code is read once, and
sums are always added in the same order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsrpc.model.formats.codes import UNIT, CodedParts
from hsrpc.model.formats.format import Product
from hsrpc.model.formats.scaled import ScaledPacking
from hsrpc.model.kernels.scaled import (
    CODES,
    TYPES,
    Kind,
    load_factor,
    load_scales,
    nothing,
    number_of,
    shift_of,
    weights_of,
)


class Share(NamedTuple):
    """What a program takes, whatever the number of rows."""

    rows: int
    channels: int
    threads: int = 128
    """Each takes eight columns at a time: the codes of all channels are on the way before it multiplies."""


SHARES = (Share(1, 8), Share(4, 4), Share(8, 4))
"""By rows, the first that has room for all that there are; by the last one codes are read again for every so many.
Sums, as many as rows times channels, stay in registers. Each is a kernel to be compiled."""


@triton.jit
def _stacked(parts, COUNT: tl.constexpr):
    """Parts [n] beside each other: [n, COUNT], a power of two."""
    for level in tl.static_range(COUNT.bit_length() - 1):
        pairs = nothing()
        for number in tl.static_range(COUNT >> level + 1):
            pairs += (tl.join(parts[number], parts[number + (COUNT >> level + 1)]),)
        parts = pairs
    return parts[0]


@triton.jit(do_not_specialize=["num_rows", "num_units", "num_channels", "num_biased"])  # one kernel for all shapes
def _multiply(
    matrices,
    owners,
    x,
    bias,
    out,
    num_rows,
    num_units,
    num_channels,
    num_biased,
    DTYPE: tl.constexpr,
    CODE: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Some channels of the matrix that `owners` names, for some rows of x [num_rows, 8 * num_units].

    They go to `out` [num_rows, num_channels], with the bias [num_biased] of the first channels: of all, or of none.
    """
    fields = matrices + tl.load(owners + tl.program_id(0)) * FIELDS
    codes = tl.load(fields + 1).to(tl.pointer_type(tl.int64 if BITS == 8 else tl.int32))
    scales = tl.load(fields + 2).to(tl.pointer_type(tl.uint8))
    zeros = tl.load(fields + 3).to(tl.pointer_type(tl.uint8))
    factor = load_factor(tl.load(fields + 4), FACTOR)
    height = number_of(fields, 5)
    first_channel = (tl.program_id(0) - number_of(fields, 0)) * CHANNELS
    first_row = tl.program_id(1) * ROWS
    eight = tl.arange(0, 8)
    sums = nothing()
    for _ in tl.static_range(CHANNELS * ROWS):
        sums += (tl.zeros((THREADS,), dtype=tl.float32),)
    for start in range(0, num_units, THREADS):
        unit = start + tl.arange(0, THREADS)
        words, found, points, given = nothing(), nothing(), nothing(), nothing()
        for number in tl.static_range(CHANNELS):
            channel = first_channel + number
            inside = unit < tl.where(channel < height, num_units, 0)
            words += (tl.load(codes + channel.to(tl.int64) * num_units + unit, mask=inside, other=0),)
            where = (channel >> number_of(fields, 6)) * number_of(fields, 8) + (unit * 8 >> number_of(fields, 7))
            found += (load_scales(scales, where, inside, SCALE),)
            if ZEROS:
                points += (tl.load(zeros + where, mask=inside, other=0),)
        for number in tl.static_range(ROWS):
            row = first_row + number
            inside = (unit < tl.where(row < num_rows, num_units, 0))[:, None]
            where = (row.to(tl.int64) * num_units + unit)[:, None] * 8 + eight[None, :]
            given += (tl.load(x + where, mask=tl.broadcast_to(inside, (THREADS, 8)), other=0.0).to(tl.float32),)
        more = nothing()
        for number in tl.static_range(CHANNELS):
            point = points[number] if ZEROS else number_of(fields, 9)
            weight = weights_of(
                words[number], found[number], point, factor, DTYPE, CODE, BITS, ZEROS, FACTOR, EACH=False
            )
            for row in tl.static_range(ROWS):
                more += (sums[number * ROWS + row] + tl.sum(weight.to(tl.float32) * given[row], axis=1),)
        sums = more
    total = tl.reshape(tl.sum(_stacked(sums, CHANNELS * ROWS), axis=0), (CHANNELS * ROWS,))
    number = tl.arange(0, CHANNELS * ROWS)
    channel, row = first_channel + number // ROWS, first_row + number % ROWS
    inside = (channel < height) & (row < num_rows)
    channel += number_of(fields, 10)
    total += tl.load(bias + channel, mask=inside & (channel < num_biased), other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * num_channels + channel, total.to(DTYPE), mask=inside)


@dataclass(frozen=True, slots=True)
class _Launch:
    """Multiplies by the matrices of a tensor that lie alike."""

    kind: Kind
    matrices: Sequence[tuple[CodedParts, int]]
    """They keep the memory whose addresses the tables have; with each the channel of its first row."""
    shares: Sequence[Share]
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """For each of those int64 [matrices, fields], as `_multiply` reads them, and int32 [programs]: the matrix of
    each program; on the device."""

    @classmethod
    def of(cls, kind: Kind, matrices: Sequence[tuple[CodedParts, int]], shares: Sequence[Share]) -> _Launch:
        return cls(kind, matrices, shares, [_tables(matrices, share.channels) for share in shares])

    def run(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Fill their channels of `out` [n, channels]."""
        kind, (rows, columns) = self.kind, x.shape
        number = min(bisect_left([share.rows for share in self.shares], rows), len(self.shares) - 1)
        share, (matrices, owners) = self.shares[number], self.tables[number]
        _multiply[(len(owners), triton.cdiv(rows, share.rows))](
            matrices,
            owners,
            x,
            x if bias is None else bias,
            out,
            rows,
            columns // UNIT,
            out.shape[1],
            0 if bias is None else len(bias),
            DTYPE=TYPES[x.dtype],
            CODE=CODES[kind.code],
            BITS=kind.code.bits,
            SCALE=kind.scale,
            ZEROS=kind.has_zeros,
            FACTOR=kind.factor,
            ROWS=share.rows,
            CHANNELS=share.channels,
            THREADS=share.threads,
            FIELDS=matrices.shape[1],
            num_warps=share.threads // 32,
        )


def _tables(matrices: Sequence[tuple[CodedParts, int]], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_Launch.tables`, for programs of so many channels."""
    counts = [-(-parts.matrix.rows // channels) for parts, _ in matrices]
    firsts = accumulate(counts, initial=0)
    table = [[program, *_fields(parts, first)] for program, (parts, first) in zip(firsts, matrices, strict=False)]
    owners = torch.arange(len(matrices), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    device = matrices[0][0].codes.device
    return torch.tensor(table).to(device), owners.to(device)


def _fields(parts: CodedParts, first: int) -> list[int]:
    """Its row of the table that the kernel reads, without the first field."""
    matrix = parts.matrix
    addresses = (part.data_ptr() if part is not None else 0 for part in (*parts[1:4], parts.factor))
    blocks = map(shift_of, matrix.block, matrix.shape)
    return [*addresses, matrix.rows, *blocks, matrix.grid[1], matrix.zero or 0, first]


def product(packing: ScaledPacking, data: torch.Tensor, shares: Sequence[Share] = SHARES) -> Product:
    """See `Packing.product`."""
    kinds: dict[Kind, list[tuple[CodedParts, int]]] = {}
    firsts = accumulate((source.rows for source in packing.sources), initial=0)
    for parts, first in zip(packing.parts(data), firsts, strict=False):
        kinds.setdefault(Kind.of(parts.matrix), []).append((parts, first))
    launches = [_Launch.of(kind, matrices, shares) for kind, matrices in kinds.items()]

    def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.new_empty((len(x), packing.shape[0]))
        for launch in launches:
            launch.run(x.contiguous(), bias, out)
        return out

    return multiply
