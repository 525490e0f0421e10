"""Triton kernels for what torch computes in several passes over memory; they round where torch rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 16
"""Heads of a program, which computes cosines and sines once for all of them."""
_BLOCK = 2048


@triton.jit(do_not_specialize_on_alignment=["x", "positions"])  # they begin at any row
def _rotate(x, positions, frequencies, row_stride, num_heads, half, head_dim, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, WIDTH)
    angles = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + i, mask=i < half, other=0.0)
    dtype = x.dtype.element_ty
    cos, sin = tl.cos(angles).to(dtype).to(tl.float32)[None, :], tl.sin(angles).to(dtype).to(tl.float32)[None, :]
    inside = (head < num_heads)[:, None] & (i < half)[None, :]
    start = x + row * row_stride + head[:, None] * head_dim + i[None, :]
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    turned = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    other = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(start, turned.to(dtype), mask=inside)
    tl.store(start + half, other.to(dtype), mask=inside)


def rotate_heads_(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> None:
    """As `rope.rotate_`, by the angles at `positions` [n] (see `rope.make_rotation`).

    `x` [n, heads, head_dim] may have any stride between its rows.
    """
    n, num_heads, head_dim = x.shape
    if n:
        half = head_dim // 2
        grid = (n, triton.cdiv(num_heads, _HEADS))
        width = triton.next_power_of_2(half)
        _rotate[grid](x, positions, frequencies, x.stride(0), num_heads, half, head_dim, HEADS=_HEADS, WIDTH=width)


@triton.jit
def _gate(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + column, (silu * up).to(dtype), mask=inside)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [n, f] of [gate|up] [n, 2*f], contiguous."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n, width), dtype=gate_up.dtype, device=gate_up.device)
    if n:
        _gate[n, triton.cdiv(width, _BLOCK)](gate_up, out, width, BLOCK=_BLOCK)
    return out
