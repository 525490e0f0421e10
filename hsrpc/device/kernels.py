"""Triton kernels: rows copied between pools and buffers, and coded weights decoded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.device.coding import BLOCK, CODES_IN_WORD, Coding

_BLOCK = 2048


@triton.jit
def _copy_rows(target, target_rows, source, source_rows, width, source_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(source + tl.load(source_rows + row) * source_stride + columns, mask=inside)
    tl.store(target + tl.load(target_rows + row) * width + columns, values, mask=inside)


def copy_rows(target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor) -> None:
    """`target[target_rows] = source[source_rows]` on the current stream; `target` [*, w] may be pinned host memory.

    Row numbers are int64 [n] on the device; `source` [*, w] has unit stride in its last dimension.
    """
    if not len(source_rows):
        return
    width = target.shape[1]
    grid = (len(source_rows), triton.cdiv(width, _BLOCK))
    _copy_rows[grid](target, target_rows, source, source_rows, width, source.stride(0), BLOCK=_BLOCK)


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


@triton.jit(do_not_specialize=["num_rows", "first_table", "second_table", "third_table"])
def _decode_weights(
    target,
    codes,
    planes,
    offsets,
    low,
    escapes,
    num_rows,
    first_table,
    second_table,
    third_table,
    MANTISSA_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A thread decodes a row of 16 values one behind the other: they share a word of codes, and half of each plane.

    Target and low bytes are taken as words too.
    """
    block = tl.program_id(0)
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


def decode_weights(data: torch.Tensor, coding: Coding, target: torch.Tensor) -> None:
    """As `coding.decode`, on the current stream."""
    parts = coding.parts(data)
    _decode_weights[(coding.num_blocks,)](
        target.view(-1).view(torch.int32),
        parts.codes,
        parts.planes,
        parts.offsets,
        parts.low.view(torch.int32),
        parts.escapes,
        coding.num_values // CODES_IN_WORD,
        *coding.tables,
        MANTISSA_BITS=coding.mantissa_bits,
        ROWS=BLOCK // CODES_IN_WORD,
        num_warps=4,
    )
