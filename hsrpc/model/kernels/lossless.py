"""Triton kernels that code weights and decode them: the same bytes as `lossless.encode`, the same bits as `decode`.

That codes have two bits and three levels, and that 16 values are a row, is written out in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl

from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.lossless import BLOCK, CODES_IN_WORD, Coding, choose, exponent_shift

_ROWS = BLOCK // CODES_IN_WORD
_GROUP = 16
"""Programs that are of one tensor for sure: so one word says for all of them which, and few programs have nothing to
do where its blocks end."""
_REGISTERS = {0: 80, 3: 128}
"""Registers of a thread at most, by the bits of the mantissa that have planes: seven and four programs are then on a
multiprocessor at once, and nothing spills."""


@triton.jit
def _nothing():
    return ()


@triton.jit
def _load_words(words, numbers, inside):
    return tl.load(words + numbers, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _escapes_in(codes):
    """A word of codes with a one for each that is 3."""
    return codes & (codes >> 1) & 0x55555555


@triton.jit
def _count_ones(word):
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _next_level(codes, start, escapes):
    """The codes of a block's next level, which begins at code `start`: a word for each row, and the escapes in it.

    A row has as many as it has `escapes`, 16 at most, and they begin anywhere in a word.
    """
    count = _count_ones(escapes)
    first = start + tl.cumsum(count, 0) - count
    shift = (2 * (first % 16)).to(tl.uint32)
    low = tl.load(codes + first // 16, mask=count > 0, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(codes + first // 16 + 1, mask=first % 16 + count > 16, other=0).to(tl.uint32, bitcast=True)
    found = (low >> shift) | ((high << 1) << (31 - shift))
    own = ((1 << count) << count) - 1
    return found, _escapes_in(found) & own.to(tl.uint32, bitcast=True)


@triton.jit
def _take(codes, table, exponent, has_code):
    """Where it `has_code`, a row's next code in this level: its exponent, and whether that is in the next level."""
    code = codes & 3
    exponent = tl.where(has_code, table >> (8 * code), exponent)
    return tl.where(has_code, codes >> 2, codes), exponent, has_code & (code == 3)


@triton.jit
def _pointer(fields, number: tl.constexpr, dtype: tl.constexpr, move):
    """The address in that field, and so many bytes behind it: a multiple of 16 bytes."""
    return tl.multiple_of((tl.load(fields + number) + move).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _number(fields, number: tl.constexpr):
    return tl.load(fields + number).to(tl.int32)


@triton.jit
def _decode_weights(
    tensors,
    groups,
    moves,
    MANTISSA_BITS: tl.constexpr,
    MOVES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A thread decodes a row of 16 values one behind the other: they share a word of codes, and half of each plane.

    Target and low bytes are taken as words too. A group of programs is one tensor's: `groups` says whose row of
    `tensors` [*, FIELDS] it is. Their last ones may be behind its end. MOVES: as `Packing.decoding` has `moves`; a
    program takes a group's work then: most tensors may be left out.
    """
    program = tl.program_id(0)
    if MOVES:
        fields = tensors + tl.load(groups + program) * FIELDS
        move = tl.load(moves + _number(fields, 11))
        if move >= 0:
            first, num_rows = program * GROUP - _number(fields, 0), _number(fields, 1)
            for block in range(first, min(first + GROUP, tl.cdiv(num_rows, ROWS))):
                _decode_block(fields, block, num_rows, move, MANTISSA_BITS, ROWS)
    else:
        fields = tensors + tl.load(groups + program // GROUP) * FIELDS
        block = program - _number(fields, 0)
        num_rows = _number(fields, 1)
        if block * ROWS < num_rows:
            _decode_block(fields, block, num_rows, 0, MANTISSA_BITS, ROWS)


@triton.jit
def _decode_block(fields, block, num_rows, move, MANTISSA_BITS: tl.constexpr, ROWS: tl.constexpr):
    target = _pointer(fields, 2, tl.int32, 0)
    codes = _pointer(fields, 3, tl.int32, move)
    planes = _pointer(fields, 4, tl.int32, move)
    offsets = _pointer(fields, 5, tl.int32, move)
    low = _pointer(fields, 6, tl.int32, move)
    escapes = _pointer(fields, 7, tl.uint8, move)
    first_table, second_table, third_table = _number(fields, 8), _number(fields, 9), _number(fields, 10)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    first = _load_words(codes, row, inside)
    second, among_second = _next_level(codes, tl.load(offsets + 3 * block), _escapes_in(first))
    third, among_third = _next_level(codes, tl.load(offsets + 3 * block + 1), among_second)
    count = _count_ones(among_third)
    escape = tl.load(offsets + 3 * block + 2) + tl.cumsum(count, 0) - count
    mantissa = _nothing()
    for bit in tl.static_range(MANTISSA_BITS):
        plane = _load_words(planes, row // 2 * MANTISSA_BITS + bit, inside)
        mantissa += (plane >> (16 * (row % 2)).to(tl.uint32),)
    words = _nothing()
    for value in tl.static_range(16):
        if value % 4 == 0:
            low_bytes = _load_words(low, row * 4 + value // 4, inside)
        has_code = tl.full((ROWS,), True, tl.int1)
        first, exponent, has_code = _take(first, first_table, tl.zeros_like(first), has_code)
        second, exponent, has_code = _take(second, second_table, exponent, has_code)
        third, exponent, has_code = _take(third, third_table, exponent, has_code)
        exponent = tl.where(has_code, tl.load(escapes + escape, mask=has_code, other=0), exponent)
        escape += has_code.to(tl.int32)
        high = (exponent & 0xFF) << MANTISSA_BITS
        for bit in tl.static_range(MANTISSA_BITS):
            high |= ((mantissa[bit] >> value) & 1) << bit
        turned = (high << 8) | ((low_bytes >> (8 * (value % 4))) & 0xFF)
        if value % 2 == 0:
            even = turned
        else:
            pair = even | (turned << 16)
            words += (((pair >> 1) & 0x7FFF7FFF) | ((pair & 0x00010001) << 15),)
    left = tl.join(tl.join(words[0], words[4]), tl.join(words[2], words[6]))
    right = tl.join(tl.join(words[1], words[5]), tl.join(words[3], words[7]))
    found = tl.reshape(tl.join(left, right), (ROWS, 8)).to(tl.int32, bitcast=True)
    where = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(target + where, found, mask=tl.broadcast_to(inside[:, None], (ROWS, 8)))


@dataclass(frozen=True, slots=True)
class WeightDecoder:
    """Decodes several tensors of one element type in one launch, again and again."""

    encoded: Sequence[Encoded[Coding]]
    """They keep the memory whose addresses the table has."""
    tensors: torch.Tensor
    """int64 [tensors, fields], as `_decode_weights` reads them, on the device."""
    groups: torch.Tensor
    """int32 [groups]: the tensor of each group of programs, on the device."""
    moves: torch.Tensor | None
    """As `Packing.decoding` has them."""
    mantissa_bits: int

    @classmethod
    def of(cls, tensors: Sequence[Encoded[Coding]], moves: torch.Tensor | None = None) -> WeightDecoder:
        """Made once for the memory that they lie in, which takes long; the host waits for the current stream."""
        [mantissa_bits] = {each.packing.mantissa_bits for each in tensors}
        device, counts = tensors[0].data.device, [-(-each.packing.num_blocks // _GROUP) for each in tensors]
        firsts = accumulate(counts, initial=0)
        fields = [_fields(first * _GROUP, each) for first, each in zip(firsts, tensors, strict=False)]
        groups = torch.arange(len(tensors), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        return cls(tensors, torch.tensor(fields).to(device), groups.to(device), moves, mantissa_bits)

    def run(self) -> None:
        """As `lossless.decode` of each, on the current stream."""
        programs = len(self.groups) * (_GROUP if self.moves is None else 1)
        _decode_weights[(programs,)](
            self.tensors,
            self.groups,
            self.groups if self.moves is None else self.moves,
            MANTISSA_BITS=self.mantissa_bits,
            MOVES=self.moves is not None,
            ROWS=_ROWS,
            GROUP=_GROUP,
            FIELDS=self.tensors.shape[1],
            num_warps=4,
            maxnreg=_REGISTERS[self.mantissa_bits],
        )


def _fields(first_program: int, encoded: Encoded[Coding]) -> list[int]:
    """A tensor's row of the table that the kernel reads."""
    coding, data, target, number = encoded
    parts = [data.data_ptr() + start for start, _ in coding.bounds()]
    return [first_program, coding.num_values // CODES_IN_WORD, target.data_ptr(), *parts, *coding.tables, number]


@triton.jit
def _turn(values):
    """As `lossless.turn`."""
    bits = values.to(tl.uint16, bitcast=True).to(tl.uint32)
    return ((bits << 1) | (bits >> 15)) & 0xFFFF


@triton.jit(do_not_specialize=["num_values"])
def _count_exponents(values, counts, num_values, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < num_values
    exponents = _turn(tl.load(values + number, mask=inside, other=0)) >> SHIFT
    found = tl.histogram(exponents.to(tl.int32), 256, mask=inside)
    tl.atomic_add(counts + tl.arange(0, 256), found, mask=found > 0)


@triton.jit(do_not_specialize=["num_rows"])
def _write_rows(values, ranks, codes, planes, low, counts, num_rows, MANTISSA_BITS: tl.constexpr, ROWS: tl.constexpr):
    """What rows of 16 values have of their own: codes of the first level, planes (halves of words) and low bytes.

    And `counts` how many values the block has in each level behind, and as escapes.
    """
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 16)[None, :]
    inside = row < num_rows
    whole = tl.broadcast_to(inside[:, None], (ROWS, 16))
    number = row[:, None] * 16 + column
    turned = _turn(tl.load(values + number, mask=whole, other=0))
    rank = tl.load(ranks + (turned >> (8 + MANTISSA_BITS)).to(tl.int32), mask=whole, other=0)
    word = tl.sum(tl.minimum(rank, 3) << (2 * column), axis=1)
    tl.store(codes + row, word, mask=inside)
    tl.store(low + number, (turned & 0xFF).to(tl.uint8), mask=whole)
    for bit in tl.static_range(MANTISSA_BITS):
        half = tl.sum(((turned >> (8 + bit)) & 1).to(tl.int32) << column, axis=1)
        tl.store(planes + (row // 2 * MANTISSA_BITS + bit) * 2 + row % 2, half.to(tl.int16), mask=inside)
    for level in tl.static_range(3):
        behind = tl.sum(tl.sum((rank >= 3 * (level + 1)).to(tl.int32), axis=1), axis=0)
        tl.store(counts + 3 * block + level, behind)


@triton.jit(do_not_specialize=["num_values", "first"])
def _spread_levels(values, ranks, offsets, codes, escapes, num_values, first, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The codes of the second and third level, a byte each; `first` is the number of the first one. And the escapes."""
    block = tl.program_id(0)
    number = block * BLOCK + tl.arange(0, BLOCK)
    inside = number < num_values
    exponents = _turn(tl.load(values + number, mask=inside, other=0)) >> SHIFT
    rank = tl.load(ranks + exponents.to(tl.int32), mask=inside, other=0)
    for level in tl.static_range(3):
        reached = rank >= 3 * (level + 1)
        place = tl.load(offsets + 3 * block + level) + tl.cumsum(reached.to(tl.int32), 0) - 1
        if level < 2:
            code = tl.minimum(rank - 3 * (level + 1), 3)
            tl.store(codes + (place - first), code.to(tl.uint8), mask=reached)
        else:
            tl.store(escapes + place, exponents.to(tl.uint8), mask=reached)


@triton.jit(do_not_specialize=["first", "num_words"])
def _pack_codes(codes, words, first, num_words, WORDS: tl.constexpr):
    """Pack codes [rows, 16] into words from the number `first` on."""
    row = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    column = tl.arange(0, 16)[None, :]
    inside = row < num_words
    whole = tl.broadcast_to(inside[:, None], (WORDS, 16))
    found = tl.load(codes + row[:, None] * 16 + column, mask=whole, other=0).to(tl.int32)
    tl.store(words + first + row, tl.sum(found << (2 * column), axis=1), mask=inside)


def encode_weights(values: torch.Tensor) -> tuple[Coding, torch.Tensor]:
    """As `lossless.encode`, on the current stream, for which the host waits once."""
    device, flat = values.device, values.reshape(-1).view(torch.int16)
    grid, num_values = (triton.cdiv(len(flat), BLOCK),), len(flat)
    found = torch.zeros(256, dtype=torch.int32, device=device)
    shift = exponent_shift(values.dtype)
    _count_exponents[grid](flat, found, num_values, SHIFT=shift, BLOCK=BLOCK)
    coding = choose(values, found.cpu())
    data = torch.zeros(coding.num_bytes, dtype=torch.uint8, device=device)
    parts, ranks = coding.views(data), coding.ranks.to(device, non_blocking=True)
    counts = torch.empty_like(parts.offsets)
    _write_rows[grid](
        flat,
        ranks,
        parts.codes,
        parts.planes.view(torch.int16),
        parts.low,
        counts,
        num_values // CODES_IN_WORD,
        MANTISSA_BITS=coding.mantissa_bits,
        ROWS=_ROWS,
    )
    parts.offsets.copy_(coding.offsets(counts))
    first, end = coding.level_words[1], coding.level_words[-1]
    codes = torch.zeros((end - first) * CODES_IN_WORD, dtype=torch.uint8, device=device)
    _spread_levels[grid](
        flat,
        ranks,
        parts.offsets,
        codes,
        parts.escapes,
        num_values,
        first * CODES_IN_WORD,
        SHIFT=shift,
        BLOCK=BLOCK,
    )
    if first < end:
        _pack_codes[(triton.cdiv(end - first, _ROWS),)](codes, parts.codes, first, end - first, WORDS=_ROWS)
    return coding, data
