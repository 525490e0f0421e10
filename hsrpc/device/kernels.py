"""Triton kernels: rows copied between pools and buffers, and coded weights decoded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.device.coding import BLOCK, CODES_IN_WORD, WORD, Coding

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


@triton.jit(do_not_specialize=["num_values", "first_table", "second_table", "third_table"])
def _decode_weights(
    target,
    codes,
    planes,
    offsets,
    low,
    escapes,
    num_values,
    first_table,
    second_table,
    third_table,
    MANTISSA_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    CODES_IN_WORD: tl.constexpr,
):
    block = tl.program_id(0)
    values = block * BLOCK + tl.arange(0, BLOCK)
    inside = values < num_values
    left, position = inside, values
    exponent = tl.zeros((BLOCK,), tl.int32)
    for level in tl.static_range(3):  # as many as `coding.LEVELS`
        table = first_table if level == 0 else (second_table if level == 1 else third_table)
        word = tl.load(codes + position // CODES_IN_WORD, mask=left, other=0)
        code = (word >> (2 * (position % CODES_IN_WORD))) & 3
        exponent = tl.where(left, (table >> (8 * code)) & 0xFF, exponent)
        left = left & (code == 3)
        position = tl.load(offsets + 3 * block + level) + tl.cumsum(left.to(tl.int32), 0) - 1
    exponent = tl.where(left, tl.load(escapes + position, mask=left, other=0).to(tl.int32), exponent)
    high = exponent << MANTISSA_BITS
    for bit in tl.static_range(MANTISSA_BITS):
        plane = tl.load(planes + values // WORD * MANTISSA_BITS + bit, mask=inside, other=0)
        high |= ((plane >> (values % WORD)) & 1) << bit
    turned = (high << 8) | tl.load(low + values, mask=inside, other=0).to(tl.int32)
    tl.store(target + values, ((turned >> 1) | ((turned & 1) << 15)).to(tl.int16), mask=inside)


def decode_weights(data: torch.Tensor, coding: Coding, target: torch.Tensor) -> None:
    """As `coding.decode`, on the current stream."""
    parts = coding.parts(data)
    _decode_weights[(coding.num_blocks,)](
        target.view(torch.int16),
        *parts,
        coding.num_values,
        *coding.tables,
        MANTISSA_BITS=coding.mantissa_bits,
        BLOCK=BLOCK,
        WORD=WORD,
        CODES_IN_WORD=CODES_IN_WORD,
        num_warps=8,
    )
