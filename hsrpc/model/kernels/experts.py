"""Triton kernels: the MLPs of a mixture of experts, all in one launch for each product, without a word to the host.

Choices of experts are sorted by expert. A program of a product takes a tile of one expert's rows, and finds the weights
by a table of device addresses: they may lie anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsrpc.model.experts import PlacedExperts, Routing
from hsrpc.model.family import Routes
from hsrpc.model.kernels.fused import gated
from hsrpc.model.layers import Gating

_SORTED_AT_ONCE = 4096
"""Choices that a program looks at together."""
_GROUP = 8
"""Tiles of rows whose programs are neighbours, for each tile of columns: they share weights in the cache."""


class Tiles(NamedTuple):
    """Constants of a product's programs."""

    rows: int
    columns: int
    """Columns of gate, and of up; twice as many of the second product."""
    inner: int
    warps: int
    stages: int
    """Stages of 16-bit numbers; there is room for one of float32."""


FEW = Tiles(16, 32, 128, 4, 4)
"""Weights are read as fast as memory gives them: many small programs."""
SOME = Tiles(64, 64, 64, 4, 4)
MANY = Tiles(128, 64, 64, 8, 3)
"""Columns of a tile: of the first product a program takes as many of gate as of up, twice these."""
_MEAN_ROWS = ((16, FEW), (64, SOME))
"""Up to so many rows for an expert, on average, the tiles."""


@triton.jit
def _route(
    weights,
    chosen,
    logits,
    correction,
    scale,
    SCORING: tl.constexpr,
    RENORMALISED: tl.constexpr,
    CORRECTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_K: tl.constexpr,
) -> None:
    """The experts of one token: the best ones, each in turn, and what they weigh."""
    row = tl.program_id(0)
    e = tl.arange(0, PADDED)
    j = tl.arange(0, PADDED_K)
    scores = tl.load(logits + row * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    ranks = scores
    if CORRECTED:
        ranks += tl.load(correction + e, mask=e < EXPERTS, other=0.0)
    ranks = tl.where(e < EXPERTS, ranks, float("-inf"))
    best = tl.zeros([PADDED_K], tl.int64)
    weight = tl.full([PADDED_K], float("-inf") if SCORING == "chosen" else 0.0, tl.float32)
    for i in range(K):
        expert = tl.minimum(tl.argmax(ranks, 0), EXPERTS - 1)
        best = tl.where(j == i, expert.to(tl.int64), best)
        weight = tl.where(j == i, tl.sum(tl.where(e == expert, scores, 0.0), 0), weight)
        ranks = tl.where(e == expert, float("-inf"), ranks)
    if SCORING == "chosen":
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
    if RENORMALISED:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(chosen + row * K + j, best, mask=j < K)
    tl.store(weights + row * K + j, weight * scale, mask=j < K)


def route(logits: torch.Tensor, correction: torch.Tensor | None, routing: Routing, k: int) -> Routes:
    """As `Routing.of` of the router's `logits` [n, E], contiguous, without groups; of equal experts the first ones."""
    n, num_experts = logits.shape
    weights = torch.empty((n, k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((n, k), dtype=torch.int64, device=logits.device)
    if n:
        _route[n,](
            weights,
            chosen,
            logits,
            weights if correction is None else correction,
            routing.scale,
            SCORING=routing.scoring.value,
            RENORMALISED=routing.renormalised,
            CORRECTED=correction is not None,
            EXPERTS=num_experts,
            K=k,
            PADDED=triton.next_power_of_2(num_experts),
            PADDED_K=triton.next_power_of_2(k),
            num_warps=1,
        )
    return Routes(weights, chosen)


@triton.jit(do_not_specialize=["num_choices"])
def _sort(chosen, rows, counts, num_choices, TILE: tl.constexpr):
    """One expert: its place behind the experts before it, and the choices of it, in order."""
    expert = tl.program_id(0)
    before = 0
    count = 0
    for first in range(0, num_choices, TILE):
        i = first + tl.arange(0, TILE)
        each = tl.load(chosen + i, mask=i < num_choices, other=1 << 30).to(tl.int32)
        before += tl.sum((each < expert).to(tl.int32), 0)
        count += tl.sum((each == expert).to(tl.int32), 0)
    tl.store(counts + expert, count)
    for first in range(0, num_choices, TILE):
        i = first + tl.arange(0, TILE)
        each = tl.load(chosen + i, mask=i < num_choices, other=1 << 30).to(tl.int32)
        mine = (each == expert).to(tl.int32)
        tl.store(rows + before + tl.cumsum(mine, 0) - mine, i, mask=mine > 0)
        before += tl.sum(mine, 0)


@triton.jit
def _tile(
    counts,
    num_columns,
    num_tiles,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The expert of this program, or EXPERTS; its first sorted row, the end of its expert's, and its first column."""
    across = tl.cdiv(num_columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(num_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    tile = group * GROUP + within % height
    e = tl.arange(0, PADDED)
    count = tl.load(counts + e, mask=e < EXPERTS, other=0)
    tiles = (count + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum(((ends <= tile) & (e < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, count, 0), 0)
    end = before + tl.sum(tl.where(e == expert, count, 0), 0)
    first = before + (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * ROWS
    return expert, first, end, (within // height) * COLUMNS


@triton.jit(do_not_specialize=["num_tiles"])
def _in(
    out,
    x,
    table,
    bias,
    rows,
    counts,
    x_stride,
    k,
    size,
    width,
    num_tiles,
    limit,
    alpha,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gated rows of one expert: out [choices as sorted, f], of x [n, h] and [gate|up] [2*f, h]."""
    expert, first, end, column = _tile(counts, width, num_tiles, EXPERTS, PADDED, ROWS, COLUMNS, GROUP)
    if expert < EXPERTS:
        dtype = x.dtype.element_ty
        weight = tl.multiple_of(tl.load(table + expert).to(tl.pointer_type(dtype)), 16)
        m = first + tl.arange(0, ROWS)
        row = tl.load(rows + m, mask=m < end, other=0) // k
        n = column + tl.arange(0, COLUMNS)
        i = tl.arange(0, INNER)
        there = n < width
        of_x = x + row.to(tl.int64)[:, None] * x_stride + i[None, :]
        of_gate = weight + n.to(tl.int64)[None, :] * size + i[:, None]
        of_up = of_gate + width.to(tl.int64) * size
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, size, INNER):
            inside = i < size - start
            a = tl.load(of_x + start, mask=(m < end)[:, None] & inside[None, :], other=0.0)
            b = tl.load(of_gate + start, mask=inside[:, None] & there[None, :], other=0.0)
            gate = tl.dot(a, b, gate, input_precision="ieee")
            b = tl.load(of_up + start, mask=inside[:, None] & there[None, :], other=0.0)
            up = tl.dot(a, b, up, input_precision="ieee")
        if HAS_BIAS:
            of_bias = bias + expert * 2 * width + n
            gate += tl.load(of_bias, mask=there, other=0.0).to(tl.float32)[None, :]
            up += tl.load(of_bias + width, mask=there, other=0.0).to(tl.float32)[None, :]
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        target = out + m.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(target, gated(gate, up, limit, alpha, dtype, GATE), mask=(m < end)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def _out(
    out,
    inner,
    table,
    bias,
    rows,
    counts,
    weights,
    width,
    size,
    num_tiles,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weighted outputs of one expert: out [choices, h], of the gated rows [choices as sorted, f] and [h, f]."""
    expert, first, end, column = _tile(counts, size, num_tiles, EXPERTS, PADDED, ROWS, COLUMNS, GROUP)
    if expert < EXPERTS:
        dtype = inner.dtype.element_ty
        weight = tl.multiple_of(tl.load(table + expert).to(tl.pointer_type(dtype)), 16)
        m = first + tl.arange(0, ROWS)
        n = column + tl.arange(0, COLUMNS)
        i = tl.arange(0, INNER)
        there = n < size
        of_inner = inner + m.to(tl.int64)[:, None] * width + i[None, :]
        of_weight = weight + n.to(tl.int64)[None, :] * width + i[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, INNER):
            inside = i < width - start
            a = tl.load(of_inner + start, mask=(m < end)[:, None] & inside[None, :], other=0.0)
            b = tl.load(of_weight + start, mask=inside[:, None] & there[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + expert * size + n, mask=there, other=0.0).to(tl.float32)[None, :]
        row = tl.load(rows + m, mask=m < end, other=0)
        factor = tl.load(weights + row, mask=m < end, other=0.0)
        added = total.to(dtype).to(tl.float32) * factor[:, None]
        target = out + row.to(tl.int64)[:, None] * size + n[None, :]
        tl.store(target, added.to(dtype), mask=(m < end)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["num_choices"])
def _mark(chosen, places, moves, decoded, num_choices, FIRST: tl.constexpr, TILE: tl.constexpr):
    """One expert: whether it is chosen, and was not before."""
    expert = tl.program_id(0)
    count = 0
    for first in range(0, num_choices, TILE):
        i = first + tl.arange(0, TILE)
        each = tl.load(chosen + i, mask=i < num_choices, other=1 << 30).to(tl.int32)
        count += tl.sum((each == expert).to(tl.int32), 0)
    before = count * 0 if FIRST else tl.load(decoded + expert).to(tl.int32)
    tl.store(moves + expert, tl.where((count > 0) & (before == 0), tl.load(places + expert), -1))
    tl.store(decoded + expert, tl.where((count > 0) | (before > 0), 1, 0))


def mark(
    chosen: torch.Tensor, places: torch.Tensor, moves: torch.Tensor, decoded: torch.Tensor, *, is_first: bool
) -> None:
    """`moves` (int64 [E]) of the experts in `chosen` [n, k], contiguous: their `places`, or -1 for all others.

    And for those that are `decoded` (int64 [E]) before, unless it `is_first`; all chosen ones are so afterwards.
    """
    _mark[len(moves),](chosen, places, moves, decoded, chosen.numel(), FIRST=is_first, TILE=_SORTED_AT_ONCE)


class SortedChoices(NamedTuple):
    """Choices of experts, numbered token by token, sorted by expert."""

    rows: torch.Tensor
    """int32 [n * k]: numbers of choices."""
    counts: torch.Tensor
    """int32 [E]: choices of each expert."""


def sort_choices(chosen: torch.Tensor, num_experts: int) -> SortedChoices:
    """`chosen` [n, k] experts, contiguous, sorted; those of one expert stay in order."""
    rows = torch.empty(chosen.numel(), dtype=torch.int32, device=chosen.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    _sort[num_experts,](chosen, rows, counts, chosen.numel(), TILE=_SORTED_AT_ONCE)
    return SortedChoices(rows, counts)


def choose_tiles(num_choices: int, num_experts: int) -> Tiles:
    """For `num_choices` rows of experts: more choices than tokens, by k."""
    mean = num_choices / num_experts
    return next((tiles for most, tiles in _MEAN_ROWS if mean <= most), MANY)


class Products(NamedTuple):
    """Both products of the experts of some rows."""

    given: SortedChoices
    placed: PlacedExperts
    k: int
    """Choices of each row."""
    tiles: Tiles

    def gated(self, x: torch.Tensor, gating: Gating) -> torch.Tensor:
        """Gated rows [n * k, f], as sorted, of x [n, h]."""
        placed, width = self.placed, self.placed.width
        out = x.new_empty((len(self.given.rows), width))
        num_tiles, grid = self._grid(width, self.tiles.columns)
        _in[grid](
            out,
            x,
            placed.ins,
            out if placed.in_bias is None else placed.in_bias,
            *self.given,
            x.stride(0),
            self.k,
            x.shape[1],
            width,
            num_tiles,
            gating.limit,
            gating.alpha,
            GATE=gating.name,
            HAS_BIAS=placed.in_bias is not None,
            **self._constants(self.tiles.columns, x.dtype),
        )
        return out

    def weighted(self, inner: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
        """Outputs [n * k, h] in the order of choices, times their `weights` [n, k], of gated rows; `size` is h."""
        placed, columns = self.placed, 2 * self.tiles.columns
        out = inner.new_empty((len(inner), size))
        num_tiles, grid = self._grid(size, columns)
        _out[grid](
            out,
            inner,
            placed.outs,
            out if placed.out_bias is None else placed.out_bias,
            *self.given,
            weights,
            placed.width,
            size,
            num_tiles,
            HAS_BIAS=placed.out_bias is not None,
            **self._constants(columns, inner.dtype),
        )
        return out

    def _grid(self, num_columns: int, columns: int) -> tuple[int, tuple[int]]:
        """Tiles of rows that there may be: each expert may have one that is not full; and programs."""
        num_choices, num_experts = len(self.given.rows), len(self.given.counts)
        num_tiles = num_choices // self.tiles.rows + min(num_experts, num_choices)
        return num_tiles, (num_tiles * triton.cdiv(num_columns, columns),)

    def _constants(self, columns: int, dtype: torch.dtype) -> dict[str, int]:
        num_experts = len(self.given.counts)
        return {
            "EXPERTS": num_experts,
            "PADDED": triton.next_power_of_2(num_experts),
            "ROWS": self.tiles.rows,
            "COLUMNS": columns,
            "INNER": self.tiles.inner,
            "GROUP": _GROUP,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages if dtype.itemsize == 2 else 1,
        }


def expert_mlps(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, placed: PlacedExperts, gating: Gating
) -> torch.Tensor:
    """[n, h]: the sum of each row's experts `chosen` [n, k], times their `weights` [n, k] (float32).

    x [n, h] has rows of any stride. Sums are taken in the order of choices: the same for the same input.
    """
    n, k = chosen.shape
    if not n:
        return torch.empty_like(x)
    tiles = choose_tiles(n * k, len(placed.ins))
    products = Products(sort_choices(chosen, len(placed.ins)), placed, k, tiles)
    return products.weighted(products.gated(x, gating), weights, x.shape[1]).view(n, k, -1).sum(1)


def compile_products(row: torch.Tensor, placed: PlacedExperts, k: int, gating: Gating) -> None:
    """Compile what `expert_mlps` launches for any number of rows such as `row` [1, h], whatever lies in the weights."""
    weights, chosen = row.new_ones((1, k), dtype=torch.float32), row.new_zeros((1, k), dtype=torch.int64)
    for tiles in (FEW, SOME, MANY):
        products = Products(sort_choices(chosen, len(placed.ins)), placed, k, tiles)
        products.weighted(products.gated(row, gating), weights, row.shape[1])
