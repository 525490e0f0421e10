"""Triton kernels: rows copied between pools and buffers, and coded weights decoded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.device.coding import BLOCK, WORD, Coding

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


@triton.jit(do_not_specialize=["base", "num_values"])
def _decode(
    target,
    planes,
    offsets,
    low,
    escapes,
    base,
    num_values,
    CODE_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    values = block * BLOCK + tl.arange(0, BLOCK)
    inside = values < num_values
    words = planes + values // WORD * (CODE_BITS + MANTISSA_BITS)
    bit = (values % WORD).to(tl.int32)
    code = tl.zeros((BLOCK,), tl.int32)
    for number in tl.static_range(CODE_BITS + MANTISSA_BITS):
        code |= ((tl.load(words + number) >> bit) & 1) << number
    place = code & ((1 << CODE_BITS) - 1)
    is_outside = (place == (1 << CODE_BITS) - 1) & inside
    rank = tl.cumsum(is_outside.to(tl.int32), 0) - 1
    escaped = tl.load(escapes + tl.load(offsets + block) + rank, mask=is_outside, other=0).to(tl.int32)
    exponent = tl.where(is_outside, escaped, base + place)
    turned = (exponent << MANTISSA_BITS) | (code >> CODE_BITS)
    turned = (turned << 8) | tl.load(low + values, mask=inside, other=0).to(tl.int32)
    tl.store(target + values, ((turned >> 1) | ((turned & 1) << 15)).to(tl.int16), mask=inside)


def decode(data: torch.Tensor, coding: Coding, target: torch.Tensor) -> None:
    """As `coding.decode`, on the current stream."""
    planes, offsets, low, escapes = coding.parts(data)
    _decode[(coding.num_blocks,)](
        target.view(torch.int16),
        planes,
        offsets,
        low,
        escapes,
        coding.base,
        coding.num_values,
        CODE_BITS=coding.code_bits,
        MANTISSA_BITS=coding.mantissa_bits,
        WORD=WORD,
        BLOCK=BLOCK,
    )
