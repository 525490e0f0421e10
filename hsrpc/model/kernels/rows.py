"""Triton kernels that write rows of codes and read them: the same bits as `formats.rows` gives on the CPU.

Codes are made and taken apart as whole numbers, so that they run where the hardware has no float8 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsrpc.model.formats.rows import MIN_SCALE, CodedRows, Codes, Rows

FP8, INT8 = 1, 2
"""What kernels know the codes by; 0: rows are numbers."""
_KINDS = {Codes.FP8: FP8, Codes.INT8: INT8}
_TILE = 2048
"""Numbers of a program, where several heads of a row are as many."""
_WIDE = 4096
"""Numbers from which on a program has more threads."""
_WORD = 4
"""Bytes in which the scales of a head's key and value lie together."""
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_WHOLE = tl.constexpr(12582912.0)
"""1.5 * 2**23: what is added to it is rounded to a whole number, to even ones where two are as near."""


@triton.jit
def _numbers(codes, KIND: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """Codes (uint8) as numbers of a type that holds them exactly; float8 ones are one `code_unit`th of what they mean.

    `NATIVE`: the hardware converts float8 itself.
    """
    if KIND == 1:
        if NATIVE:
            found = codes.to(tl.float8e4nv, bitcast=True).to(dtype)
        else:  # as float16, whose exponents begin 8 lower
            half = ((codes.to(tl.int16) & 0x80) << 8) | ((codes.to(tl.int16) & 0x7F) << 7)
            found = half.to(tl.float16, bitcast=True).to(dtype)
    else:  # the last bits of a float16 number between 1024 and 2048 are whole numbers
        half = (codes.to(tl.int16) & 0xFF) ^ 0x80 | 0x6400
        found = (half.to(tl.float16, bitcast=True) - 1152.0).to(dtype)
    return found


@triton.jit
def load_numbers(pointers, mask, like, KIND: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Numbers, or codes as numbers of the type of `like`: to be multiplied with their scale and `code_unit`."""
    if KIND:  # the compiler would go on behind a return
        found = _numbers(tl.load(pointers, mask=mask, other=0), KIND, NATIVE, like.dtype)
    else:
        found = tl.load(pointers, mask=mask, other=0.0)
    return found


@triton.jit
def code_unit(KIND: tl.constexpr, NATIVE: tl.constexpr) -> tl.constexpr:
    """What codes as numbers are to be multiplied with, beside their scale."""
    return 256.0 if KIND == 1 and not NATIVE else 1.0


@triton.jit
def first_scale(words) -> tl.tensor:
    """The scale in the first half of a word (int32): of keys."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_scale(words) -> tl.tensor:
    """The scale in the second half: of values."""
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _float8(x):
    """e4m3 codes (int32) of x, float32, at most 448 in size."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (tl.abs(x) * 512.0 + _WHOLE).to(tl.int32, bitcast=True) & 0xF
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _whole(x):
    """Whole numbers (int32) nearest to x, float32."""
    return (x + _WHOLE).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _encode(
    target,
    target_scales,
    target_rows,
    source,
    source_rows,
    source_stride,
    columns,
    num_heads,
    first_width,
    second_width,
    scales_start,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
    SELECTS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row, some heads of one of its parts. `target_scales` is `target` in units of 2 bytes."""
    row, part = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    width = tl.where(part == 0, first_width, second_width)
    column = tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None] & (column < width)[None, :]
    source_row = (tl.load(source_rows + row) if SELECTS else row).to(tl.int64)
    target_row = (tl.load(target_rows + row) if PLACES else row).to(tl.int64)
    where = part * num_heads * first_width + head[:, None] * width + column[None, :]
    x = tl.load(source + source_row * source_stride + where, mask=inside, other=0.0).to(tl.float32)
    # As bits, since a maximum of numbers would pass over what is none.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    bits = (tl.div_rn(largest, LARGEST).to(tl.int32, bitcast=True) + 0xFFFF) & -65536
    scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
    scaled = x * tl.div_rn(1.0, scale)[:, None]
    codes = _float8(scaled) if KIND == 1 else _whole(scaled)
    tl.store(target + target_row * columns + where, codes.to(tl.uint8), mask=inside)
    to = target_scales + target_row * (columns // 2) + scales_start + head * PARTS + part
    tl.store(to, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=head < num_heads)


@triton.jit
def _decode(
    target,
    rows,
    scales,
    columns,
    width,
    num_heads,
    first_width,
    second_width,
    scales_start,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one row. `scales` are the rows in units of 2 bytes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    part = (column >= num_heads * first_width).to(tl.int32)
    head = (column - part * num_heads * first_width) // tl.where(part == 0, first_width, second_width)
    codes = tl.load(rows + row * columns + column, mask=inside, other=0)
    scale = tl.load(scales + row * (columns // 2) + scales_start + head * PARTS + part, mask=inside, other=0)
    number = _numbers(codes, KIND, False, tl.float32)
    value = number * (first_scale(scale.to(tl.int32)) * code_unit(KIND, False))
    tl.store(target + row * width + column, value.to(target.dtype.element_ty), mask=inside)


def encode(
    rows: CodedRows,
    target: torch.Tensor,
    values: torch.Tensor,
    *,
    target_rows: torch.Tensor | None = None,
    source_rows: torch.Tensor | None = None,
) -> None:
    """Write values [*, width], whose rows may be strided, as rows of `target` [*, columns], which may be pinned memory.

    All of the values, or those in `source_rows`; to as many rows from the first on, or to `target_rows`: int64 [n].
    """
    count = len(values) if source_rows is None else len(source_rows)
    if not count:
        return
    num_heads, widths = rows.shape
    tile_width = triton.next_power_of_2(max(widths))
    heads = min(max(1, _TILE // tile_width), triton.next_power_of_2(num_heads))
    _encode[count, triton.cdiv(num_heads, heads), len(widths)](
        target,
        target.view(torch.int16),
        target if target_rows is None else target_rows,
        values,
        values if source_rows is None else source_rows,
        values.stride(0),
        target.stride(0),
        num_heads,
        widths[0],
        widths[-1],
        rows.first_scale // 2,
        KIND=_KINDS[rows.codes],
        LARGEST=rows.codes.largest,
        PARTS=len(widths),
        PLACES=target_rows is not None,
        SELECTS=source_rows is not None,
        HEADS=heads,
        WIDTH=tile_width,
        num_warps=8 if heads * tile_width > _WIDE else 4,
        enable_fp_fusion=False,  # a sum with a product that is not rounded would give other codes
    )


def decode(rows: CodedRows, coded: torch.Tensor) -> torch.Tensor:
    """What rows [n, columns] mean: [n, width]."""
    num_heads, widths = rows.shape
    values = torch.empty((len(coded), rows.shape.width), dtype=rows.computed, device=coded.device)
    if len(coded):
        _decode[len(coded), triton.cdiv(rows.shape.width, _TILE)](
            values,
            coded,
            coded.view(torch.int16),
            coded.stride(0),
            rows.shape.width,
            num_heads,
            widths[0],
            widths[-1],
            rows.first_scale // 2,
            KIND=_KINDS[rows.codes],
            PARTS=len(widths),
            BLOCK=_TILE,
        )
    return values


class Coding(NamedTuple):
    """What the kernels of attention are told of the rows that they read."""

    kind: int
    """0: numbers as they are."""
    row_size: int
    """Elements of a row; of a coded one they are bytes."""
    first_word: int
    """Word of a coded row with the first head's scales."""
    is_native: bool
    """The hardware converts float8."""

    def words(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows as words, where they are coded."""
        return rows.view(torch.int32) if self.kind else rows


def coding_of(rows: Rows, device: torch.device) -> Coding:
    """How these rows are coded on a device."""
    if not isinstance(rows, CodedRows):
        return Coding(0, rows.columns, 0, is_native=False)
    is_native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return Coding(_KINDS[rows.codes], rows.columns, rows.first_scale // _WORD, is_native)
