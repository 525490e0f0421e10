"""Triton kernels for what torch computes in several passes over memory; they round where torch rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.model.layers import Gating
from hsrpc.model.rope import HeadNorms

_HEADS = 16
"""Heads of a program, which computes cosines and sines once for all of them."""
_BLOCK = 2048


@triton.jit
def _weighted(x, query_weight, key_weight, offset, is_query, inside, dtype: tl.constexpr):
    """x [heads, i] times the weight of its head and `offset`, rounded."""
    of_queries = tl.load(query_weight[None, :], mask=inside & is_query, other=0.0).to(tl.float32)
    of_keys = tl.load(key_weight[None, :], mask=inside & ~is_query, other=0.0).to(tl.float32)
    return (x * (of_queries + of_keys + offset)).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["x", "positions"])  # they begin at any row
def _rotate(
    x,
    positions,
    frequencies,
    query_weight,
    key_weight,
    row_stride,
    head_stride,
    num_queries,
    num_heads,
    half,
    head_dim,
    factor,
    epsilon,
    offset,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, WIDTH)
    angles = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + i, mask=i < half, other=0.0)
    dtype = x.dtype.element_ty
    cos = (tl.cos(angles) * factor).to(dtype).to(tl.float32)[None, :]
    sin = (tl.sin(angles) * factor).to(dtype).to(tl.float32)[None, :]
    inside = (head < num_heads)[:, None] & (i < half)[None, :]
    start = x + row * row_stride + head[:, None] * head_stride + i[None, :]
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / head_dim + epsilon)[:, None]
        is_query = (head < num_queries)[:, None]
        first = _weighted(first * scale, query_weight + i, key_weight + i, offset, is_query, inside, dtype)
        i += half
        second = _weighted(second * scale, query_weight + i, key_weight + i, offset, is_query, inside, dtype)
    turned = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    other = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(start, turned.to(dtype), mask=inside)
    tl.store(start + half, other.to(dtype), mask=inside)


def rotate_heads_(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, factor: float, norms: HeadNorms | None = None
) -> None:
    """As `rope.rotate_` of each head's first dimensions, two for each of `frequencies`, by the angles at `positions`.

    `x` [n, heads, head_dim] may have any strides between its rows and heads; `positions` [n]; for `factor` see
    `rope.make_table`. With `norms` all dimensions are rotated, and normed first.
    """
    n, num_heads, head_dim = x.shape
    if not n:
        return
    half = len(frequencies)
    queries, keys, num_queries, epsilon, offset = norms or HeadNorms(x, x, 0, 0.0)
    _rotate[(n, triton.cdiv(num_heads, _HEADS))](
        x,
        positions,
        frequencies,
        queries,
        keys,
        x.stride(0),
        x.stride(1),
        num_queries,
        num_heads,
        half,
        head_dim,
        factor,
        epsilon,
        offset,
        NORM=norms is not None,
        HEADS=_HEADS,
        WIDTH=triton.next_power_of_2(half),
    )


@triton.jit
def gated(gate, up, limit, alpha, dtype: tl.constexpr, GATE: tl.constexpr):
    """gate's activation times up, both float32, rounded."""
    if GATE == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif GATE == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif GATE == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # 0.5 * (1 + tanh(x)) is the sigmoid of 2 * x; 80: exp does not overflow.
        active = gate / (1.0 + tl.exp(tl.minimum(-2.0 * inner, 80.0)))
    elif GATE == "relu":
        active = tl.maximum(gate, 0.0)
    elif GATE == "relu2":
        active = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    else:  # clamped
        bounded = tl.minimum(gate, limit)
        active = bounded / (1.0 + tl.exp(-alpha * bounded))
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
    return (active.to(dtype).to(tl.float32) * up).to(dtype)


@triton.jit
def _gate(gate_up, out, width, limit, alpha, GATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gated(gate, up, limit, alpha, out.dtype.element_ty, GATE), mask=inside)


def gate(gate_up: torch.Tensor, gating: Gating) -> torch.Tensor:
    """What the gate makes [n, f] of [gate|up] [n, 2*f], contiguous."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n, width), dtype=gate_up.dtype, device=gate_up.device)
    if n:
        grid = n, triton.cdiv(width, _BLOCK)
        _gate[grid](gate_up, out, width, gating.limit, gating.alpha, GATE=gating.name, BLOCK=_BLOCK)
    return out
