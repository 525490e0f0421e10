"""A Triton kernel that decodes codes with scales: the same bits as `codes.decode`; and what codes mean to kernels.

All matrices of a layer that lie alike are decoded in one launch. A thread decodes units of eight columns, which share a
scale where that can be: so codes are read and weights written as words, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsrpc.model.formats.codes import UNIT, Code, CodedMatrix, CodedParts, Factor
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking

_GROUP = 16
"""Programs that are of one matrix for sure: one word says for all of them which."""
_LEAST_WIDTH = 3
_WHOLE = 30
"""Exponent of two beyond all sizes: where a whole row shares a scale."""
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCALES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e8m0fnu: 3,
    torch.float8_e4m3fn: 4,
}
FACTORS = {None: 0, Factor.MULTIPLIES: 1, Factor.DIVIDES: 2}
CODES = {Code.E4M3: 0, Code.E2M1: 1, Code.UINT8: 2, Code.UINT4: 2}


class Tiles(NamedTuple):
    """What a program decodes."""

    threads: int = 128
    units: int = 8
    """Units that a thread decodes: the codes of all are on the way before the first one is decoded."""


TILES, TILES_EACH = Tiles(), Tiles(units=4)
"""Where units share a scale, and where it is found for each column."""


@triton.jit
def number_of(fields, number: tl.constexpr):
    """A field of a matrix, which fits 32 bits."""
    return tl.load(fields + number).to(tl.int32)


@triton.jit
def nothing():
    """What tuples begin with."""
    return ()


@triton.jit
def _e4m3(code):
    """What an e4m3 code means, float32: 1 bit is the sign, 4 the exponent (bias 7), 3 the mantissa; 0x7F is NaN.

    Exponent and mantissa where float32 has theirs are 2**120 times too small, those below the least exponent included.
    """
    bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    found = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((code & 0x7F) == 0x7F, float("nan"), found)


@triton.jit
def _e2m1(code):
    """What an e2m1 code means, float32: 1 bit is the sign, 2 the exponent (bias 1), 1 the mantissa."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def load_scales(scales, where, inside, SCALE: tl.constexpr):
    """Scales as float32."""
    if SCALE == 0:
        return tl.load(scales.to(tl.pointer_type(tl.float32)) + where, mask=inside, other=0.0)
    if SCALE == 1:
        return tl.load(scales.to(tl.pointer_type(tl.float16)) + where, mask=inside, other=0.0).to(tl.float32)
    if SCALE == 2:
        return tl.load(scales.to(tl.pointer_type(tl.bfloat16)) + where, mask=inside, other=0.0).to(tl.float32)
    if SCALE == 3:
        exponent = tl.load(scales + where, mask=inside, other=0).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return tl.where(exponent == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    return _e4m3(tl.load(scales + where, mask=inside, other=0).to(tl.int32))


@triton.jit
def _numbers(words, CODE: tl.constexpr, BITS: tl.constexpr):
    """What the eight codes of each word mean, float32 [words, 8]."""
    shift = BITS * tl.arange(0, 8)
    code = (words[:, None] >> shift[None, :]).to(tl.int32) & ((1 << BITS) - 1)
    if CODE == 0:
        return _e4m3(code)
    if CODE == 1:
        return _e2m1(code)
    return code.to(tl.float32)


@triton.jit
def load_factor(address, FACTOR: tl.constexpr):
    """The number for all scales, float32, where there is one."""
    if FACTOR > 0:  # noqa: SIM108 (one of both is compiled)
        factor = tl.load(address.to(tl.pointer_type(tl.float32)))
    else:
        factor = 1.0
    return factor


@triton.jit
def weights_of(
    words,
    scale,
    point,
    factor,
    DTYPE: tl.constexpr,
    CODE: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    FACTOR: tl.constexpr,
    EACH: tl.constexpr,
):
    """The weights of the eight codes of each word, rounded: DTYPE [words, 8].

    `scale` and, with ZEROS, `point` are of each word, with EACH of each code; else `point` is a number for all.
    """
    if FACTOR > 0:
        scale = scale * factor if FACTOR == 1 else tl.div_rn(scale, factor)
    value = _numbers(words, CODE, BITS)
    if ZEROS:
        zero = point.to(tl.float32)
        value -= zero if EACH else zero[:, None]
    elif CODE == 2:
        value -= point.to(tl.float32)
    return (value * (scale if EACH else scale[:, None])).to(DTYPE)


@triton.jit
def _scales_in_row(fields, move, unit, column, num_columns, EACH: tl.constexpr, GROUPS: tl.constexpr):
    """Which scale of their rows units of eight columns have: a unit, or each of its columns."""
    if GROUPS:
        groups = (tl.load(fields + 5) + move).to(tl.pointer_type(tl.int32))
        found = tl.load(groups + column, mask=column < num_columns, other=0)
    elif EACH:
        found = column // number_of(fields, 10)
    else:
        found = unit * 8 >> number_of(fields, 10)
    return found


@triton.jit
def _first_scales(fields, row, EACH: tl.constexpr):
    """The first scale of rows; [rows, 1] where scales are found for each column."""
    row_block, across = number_of(fields, 9), number_of(fields, 11)
    if EACH:  # noqa: SIM108 (one of both is compiled)
        found = (row // row_block * across)[:, None]
    else:
        found = (row >> row_block) * across
    return found


@triton.jit
def _decode_units(
    matrices,
    owners,
    moves,
    DTYPE: tl.constexpr,
    CODE: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    FACTOR: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOVES: tl.constexpr,
    THREADS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A program decodes some rows of the matrix that `owners` names, by its row of `matrices` [*, FIELDS].

    EACH: scales are found for each column, since columns of a unit may have different ones, or blocks have sizes that
    are no powers of two. MOVES: as `Packing.decoding` has `moves`; a program takes a group's work then, one part after
    the other, since most matrices may be left out: a program that has nothing to do takes time as well.
    """
    program = tl.program_id(0)
    if MOVES:
        fields = matrices + tl.load(owners + program) * FIELDS
        move = tl.load(moves + number_of(fields, 15))
        if move >= 0:
            first = program * GROUP - number_of(fields, 0)
            for tile in range(first, first + GROUP):
                _decode_rows(
                    fields, tile, move, DTYPE, CODE, BITS, SCALE, ZEROS, FACTOR, EACH, GROUPS, ALIGNED, THREADS, TILES
                )
    else:
        fields = matrices + tl.load(owners + program // GROUP) * FIELDS
        tile = program - number_of(fields, 0)
        _decode_rows(fields, tile, 0, DTYPE, CODE, BITS, SCALE, ZEROS, FACTOR, EACH, GROUPS, ALIGNED, THREADS, TILES)


@triton.jit
def _decode_rows(
    fields,
    tile,
    move,
    DTYPE: tl.constexpr,
    CODE: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    FACTOR: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    THREADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A tile of the matrix of `fields`, whose packed bytes lie `move` bytes behind what these say."""
    target = tl.load(fields + 1).to(tl.pointer_type(DTYPE))
    codes = (tl.load(fields + 2) + move).to(tl.pointer_type(tl.int64 if BITS == 8 else tl.int32))
    scales = (tl.load(fields + 3) + move).to(tl.pointer_type(tl.uint8))
    zeros = (tl.load(fields + 4) + move).to(tl.pointer_type(tl.uint8))
    factor = load_factor(tl.load(fields + 6) + move, FACTOR)
    num_rows, num_columns = number_of(fields, 7), number_of(fields, 8)
    if ALIGNED:
        target = tl.multiple_of(target, 16)
    num_units = tl.cdiv(num_columns, 8)
    width, across = number_of(fields, 12), number_of(fields, 13)
    thread, height = tl.arange(0, THREADS), THREADS >> width
    unit = ((tile % across) << width) + (thread & ((1 << width) - 1))
    first_row = tile // across * (height * TILES) + (thread >> width)
    eight = tl.arange(0, 8)
    column = unit[:, None] * 8 + eight[None, :]
    in_row = _scales_in_row(fields, move, unit, column, num_columns, EACH, GROUPS)
    words, found, points = nothing(), nothing(), nothing()
    for number in tl.static_range(TILES):
        row = first_row + number * height
        inside = (row < num_rows) & (unit < num_units)
        words += (tl.load(codes + row * num_units + unit, mask=inside, other=0),)
        if EACH:
            inside = inside[:, None] & (column < num_columns)
        where = _first_scales(fields, row, EACH) + in_row
        found += (load_scales(scales, where, inside, SCALE),)
        if ZEROS:
            points += (tl.load(zeros + where, mask=inside, other=0),)
    for number in tl.static_range(TILES):
        row = first_row + number * height
        point = points[number] if ZEROS else number_of(fields, 14)
        value = weights_of(words[number], found[number], point, factor, DTYPE, CODE, BITS, ZEROS, FACTOR, EACH)
        inside = (row < num_rows) & (unit < num_units)
        if ALIGNED:
            where = (row.to(tl.int64) * num_units + unit)[:, None] * 8 + eight[None, :]
            tl.store(target + where, value, mask=tl.broadcast_to(inside[:, None], (THREADS, 8)))
        else:
            where = (row.to(tl.int64) * num_columns)[:, None] + column
            tl.store(target + where, value, mask=inside[:, None] & (column < num_columns))


class Kind(NamedTuple):
    """What the kernel is compiled for: matrices that lie alike."""

    code: Code
    scale: int
    has_zeros: bool
    factor: int
    is_each: bool
    """Scales are found for each column."""
    has_groups: bool
    is_aligned: bool
    """Rows have a multiple of eight columns."""

    @classmethod
    def of(cls, matrix: CodedMatrix) -> Kind:
        return cls(
            code=matrix.code,
            scale=SCALES[matrix.scale],
            has_zeros=matrix.zero is None,
            factor=FACTORS[matrix.factor],
            is_each=matrix.finds_by_column,
            has_groups=matrix.has_groups,
            is_aligned=matrix.columns % UNIT == 0,
        )


class _Matrix(NamedTuple):
    """A matrix to be decoded."""

    parts: CodedParts
    target: torch.Tensor
    tiles: Tiles
    number: int
    """Number of its tensor, see `Encoded`."""

    @property
    def matrix(self) -> CodedMatrix:
        return self.parts.matrix

    @property
    def width(self) -> int:
        """Exponent of two: units of a row for a program, so that as few as can be are behind its end."""
        units = -(-self.matrix.columns // UNIT)
        most = self.tiles.threads.bit_length() - 1
        return min(range(most, _LEAST_WIDTH - 1, -1), key=lambda width: -(-units >> width) << width)

    @property
    def across(self) -> int:
        """Programs for a row."""
        return -(-self.matrix.columns // (UNIT << self.width))

    @property
    def num_programs(self) -> int:
        rows = (self.tiles.threads >> self.width) * self.tiles.units
        return -(-self.matrix.rows // rows) * self.across

    def fields(self, kind: Kind) -> list[int]:
        """Its row of the table that the kernel reads, without the first field."""
        matrix, parts = self.matrix, self.parts
        addresses = (0 if part is None else part.data_ptr() for part in (self.target, *parts[1:]))
        blocks = matrix.block if kind.is_each else map(shift_of, matrix.block, matrix.shape)
        return [
            *addresses,
            *matrix.shape,
            *blocks,
            matrix.grid[1],
            self.width,
            self.across,
            matrix.zero or 0,
            self.number,
        ]


def shift_of(block: int, size: int) -> int:
    return _WHOLE if block >= size else block.bit_length() - 1


@dataclass(frozen=True, slots=True)
class ScaledDecoder:
    """Decodes matrices that lie alike in one launch, again and again."""

    kind: Kind
    dtype: torch.dtype
    tiles: Tiles
    matrices: Sequence[_Matrix]
    """They keep the memory whose addresses the table has."""
    table: torch.Tensor
    """int64 [matrices, fields], as `_decode_units` reads them, on the device."""
    owners: torch.Tensor
    """int32 [groups]: the matrix of each group of programs, on the device."""
    moves: torch.Tensor | None
    """As `Packing.decoding` has them."""

    @classmethod
    def of(
        cls, kind: Kind, dtype: torch.dtype, matrices: Sequence[_Matrix], moves: torch.Tensor | None
    ) -> ScaledDecoder:
        device, tiles = matrices[0].target.device, matrices[0].tiles
        counts = [-(-each.num_programs // _GROUP) for each in matrices]
        firsts = accumulate(counts, initial=0)
        table = [[first * _GROUP, *each.fields(kind)] for first, each in zip(firsts, matrices, strict=False)]
        owners = torch.arange(len(matrices), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        return cls(kind, dtype, tiles, matrices, torch.tensor(table).to(device), owners.to(device), moves)

    def run(self) -> None:
        """As `codes.decode` of each, on the current stream."""
        kind, programs = self.kind, len(self.owners) * (_GROUP if self.moves is None else 1)
        _decode_units[(programs,)](
            self.table,
            self.owners,
            self.owners if self.moves is None else self.moves,
            DTYPE=TYPES[self.dtype],
            CODE=CODES[kind.code],
            BITS=kind.code.bits,
            SCALE=kind.scale,
            ZEROS=kind.has_zeros,
            FACTOR=kind.factor,
            EACH=kind.is_each,
            GROUPS=kind.has_groups,
            ALIGNED=kind.is_aligned,
            MOVES=self.moves is not None,
            THREADS=self.tiles.threads,
            TILES=self.tiles.units,
            GROUP=_GROUP,
            FIELDS=self.table.shape[1],
            num_warps=self.tiles.threads // 32,
        )


def decoding(
    tensors: Sequence[Encoded[ScaledPacking]], moves: torch.Tensor | None = None, tiles: Tiles | None = None
) -> Callable[[], None]:
    """What decodes them, of one element type, by a launch for those that lie alike; see `Packing.decoding`.

    By other `tiles`, if given. It is made once for the memory that they lie in; the host waits for the current stream.
    """
    [dtype] = {each.packing.dtype for each in tensors}
    kinds: dict[Kind, list[_Matrix]] = {}
    for packing, data, operand, number in tensors:
        targets = operand.split([source.rows for source in packing.sources])
        for parts, target in zip(packing.parts(data), targets, strict=True):
            kind = Kind.of(parts.matrix)
            usual = TILES_EACH if kind.is_each else TILES
            kinds.setdefault(kind, []).append(_Matrix(parts, target, tiles or usual, number))
    decoders = [ScaledDecoder.of(kind, dtype, matrices, moves) for kind, matrices in kinds.items()]

    def decode() -> None:
        for decoder in decoders:
            decoder.run()

    return decode
