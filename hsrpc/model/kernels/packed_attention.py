"""Triton kernel: attention of packed rows that are codes, or whose scores are capped: torch's flash attention takes
neither."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.model.attention import HeadShape
from hsrpc.model.kernels.decode_attention import capped
from hsrpc.model.kernels.rows import Coding, code_unit, first_scale, load_numbers, second_scale

_NO_WINDOW = 1 << 30
"""Wider than any context."""
_WIDE = 128
"""Heads that are wider take smaller tiles of keys, and more warps."""


@triton.jit(do_not_specialize=["window"])
def _attend(
    out,
    queries,
    query_stride,
    kv,
    kv_words,
    query_starts,
    key_starts,
    sinks,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """One tile of a request's queries, and one head: online softmax over the tiles of keys that any of them sees.

    Rows may be codes, as in `decode_attention`.
    """
    first, head, request = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    query_start, key_start = tl.load(query_starts + request), tl.load(key_starts + request)
    num_queries = tl.load(query_starts + request + 1) - query_start
    num_keys = tl.load(key_starts + request + 1) - key_start
    if first >= num_queries:
        return
    i = first + tl.arange(0, QUERIES)
    d, e = tl.arange(0, KEY_TILE), tl.arange(0, VALUE_TILE)
    position = num_keys - num_queries + i
    inside = (i < num_queries)[:, None] & (d < KEY_DIM)[None, :]
    query_rows = (query_start + i).to(tl.int64)
    q = tl.load(queries + query_rows[:, None] * query_stride + head * KEY_DIM + d[None, :], mask=inside, other=0.0)
    k_column = head // GROUP * KEY_DIM
    v_column = k_column if SHARES else KV_HEADS * KEY_DIM + head // GROUP * VALUE_DIM
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if SINKS:
        m = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
    acc = tl.zeros([QUERIES, VALUE_TILE], tl.float32)
    seen = num_keys - num_queries + first  # by the first query of the tile, besides itself
    low = tl.maximum(seen + 1 - window, 0) // KEYS * KEYS
    high = tl.minimum(seen + QUERIES, num_keys)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < num_keys)[:, None]
        rows = (key_start + key).to(tl.int64)
        kv_rows = kv + rows[:, None] * ROW_SIZE
        k = load_numbers(kv_rows + k_column + d[None, :], there & (d < KEY_DIM)[None, :], q, KIND, NATIVE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if KIND:
            words = tl.load(
                kv_words + rows * (ROW_SIZE // 4) + FIRST_WORD + head // GROUP, mask=key < num_keys, other=0
            )
            scores = scores * (first_scale(words) * code_unit(KIND, NATIVE))[None, :]
        if SOFTCAP:
            scores = capped(scores, softcap)
        visible = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible & (key < num_keys)[None, :], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        top = tl.where(new > float("-inf"), new, 0.0)  # of a row that has seen no key yet
        p = tl.exp(scores - top[:, None])
        kept = tl.exp(m - top)
        v = load_numbers(kv_rows + v_column + e[None, :], there & (e < VALUE_DIM)[None, :], q, KIND, NATIVE)
        total = total * kept + tl.sum(p, 1)
        if KIND:
            of_values = first_scale(words) if SHARES else second_scale(words)
            largest = 1.0
            if v.dtype == tl.float16:  # as in `decode_attention`
                largest = tl.max(of_values, 0)
                of_values = of_values / tl.where(largest > 0, largest, 1.0)
            p = p * of_values[None, :]
        added = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if KIND:
            added = added * (largest * code_unit(KIND, NATIVE))
        acc = acc * kept[:, None] + added
        m = new
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = out + (query_rows[:, None] * (KV_HEADS * GROUP) + head) * VALUE_DIM + e[None, :]
    inside = (i < num_queries)[:, None] & (e < VALUE_DIM)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def packed_attention(
    queries: torch.Tensor,
    kv: torch.Tensor,
    *,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    max_queries: int,
    heads: HeadShape,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    coding: Coding | None = None,
) -> torch.Tensor:
    """[n, o] for queries [n, q], whose rows may be strided, and rows of `kv` [*, columns].

    Request i has the queries from `query_starts[i]` to `query_starts[i+1]`, which are the last of its keys, from
    `key_starts[i]` to `key_starts[i+1]`: int32 [r+1]. A query sees itself and the keys before it, `window - 1` of them.
    With `softcap` a score s becomes softcap * tanh(s / softcap); `sinks` [heads] are scores of keys without a value.
    `coding` says how rows are coded; None: they are numbers.
    """
    coding = coding or Coding(0, heads.row_size, 0, is_native=False)
    out = queries.new_empty((len(queries), heads.out_size))
    is_small, is_wide = queries.dtype != torch.float32, heads.key_dim > _WIDE
    num_tile = 64 if is_small else 16
    _attend[triton.cdiv(max_queries, num_tile), heads.num_heads, len(query_starts) - 1](
        out,
        queries,
        queries.stride(0),
        kv,
        coding.words(kv),
        query_starts,
        key_starts,
        out if sinks is None else sinks,
        _NO_WINDOW if window is None else window,
        scale,
        softcap or 1.0,
        KV_HEADS=heads.num_kv_heads,
        GROUP=heads.num_heads // heads.num_kv_heads,
        KEY_DIM=heads.key_dim,
        VALUE_DIM=heads.value_dim,
        KEY_TILE=triton.next_power_of_2(heads.key_dim),
        VALUE_TILE=triton.next_power_of_2(heads.value_dim),
        SHARES=heads.shares,
        ROW_SIZE=coding.row_size,
        FIRST_WORD=coding.first_word,
        QUERIES=num_tile,
        KEYS=64 if is_small and not is_wide else 32,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        KIND=coding.kind,
        NATIVE=coding.is_native,
        num_warps=8 if is_wide else 4,
        num_stages=2 if is_small else 1,
    )
    return out
