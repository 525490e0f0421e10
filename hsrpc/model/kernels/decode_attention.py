"""Triton kernels: attention of one query a request to rows in place and in a buffer, in parts that are then merged.

What differs from step to step is no constant of a kernel: compiling another variant would hold a step up for a second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsrpc.model.attention import HeadShape
from hsrpc.model.kernels.rows import Coding, code_unit, first_scale, load_numbers, second_scale

_PROGRAMS = 1024
"""Enough to fill a large GPU several times; fewer requests are divided into parts along their keys."""
_MIN_KEYS = 128
"""Keys of a part, where a request is divided."""
_MAX_PARTS = 32
_SPLIT_ROWS = 32
"""Query heads of a program, where all of them attend to the same wide rows: what they gather stays in registers."""
_WIDE_TILE = 8192
"""Elements of what a program gathers, from which on it is shared among more threads."""
_PACKED_DIM = 128
"""Smaller heads are read together: their rows are neighbours in memory, and matrix units have rows to spare."""


@triton.jit
def capped(scores, softcap) -> tl.tensor:
    """softcap * tanh(scores / softcap); the exponential of what is negative does not overflow."""
    power = tl.exp(tl.abs(scores) * (-2.0 / softcap))
    tanh = (1.0 - power) / (1.0 + power)
    return softcap * tl.where(scores < 0, -tanh, tanh)


@triton.jit
def _accumulate(
    q,
    q_more,
    m,
    total,
    acc,
    k_rows,
    v_offset,
    words,
    valid,
    scale,
    softcap,
    d,
    WIDTH: tl.constexpr,
    MORE: tl.constexpr,
    MORE_TILE: tl.constexpr,
    SHARES: tl.constexpr,
    DOT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Online softmax over one tile of keys: m and total [g], acc [g, d]. Keys have `MORE` dimensions behind `WIDTH`.

    Of coded rows `words` [g or 1, keys] are the scales of each query's head. In float16 what the values gather is
    divided by the tile's largest scale: weights times scales would be too small for it.
    """
    mask = valid[:, None] & (d < WIDTH)[None, :]
    k = load_numbers(k_rows + d[None, :], mask, q, KIND, NATIVE)
    scores = _scores(q, k, DOT)
    if MORE > 0:
        scores += _scores(q_more, _load_more(k_rows + WIDTH, valid, q, MORE, MORE_TILE, KIND, NATIVE), DOT)
    v = k if SHARES else load_numbers(k_rows + v_offset + d[None, :], mask, q, KIND, NATIVE)
    scores = scores * scale
    if KIND:
        scores = scores * (first_scale(words) * code_unit(KIND, NATIVE))
    if SOFTCAP:
        scores = capped(scores, softcap)
    scores = tl.where(valid[None, :], scores, float("-inf"))
    new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp(scores - new[:, None])
    kept = tl.exp(m - new)
    total = total * kept + tl.sum(p, 1)
    if KIND:
        of_values = first_scale(words) if SHARES else second_scale(words)
        top = 1.0
        if v.dtype == tl.float16:
            top = tl.max(tl.max(of_values, 1), 0)
            of_values = of_values / tl.where(top > 0, top, 1.0)
        p = p * of_values
    if DOT:
        added = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        added = tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
    if KIND:
        added = added * (top * code_unit(KIND, NATIVE))
    return new, total, acc * kept[:, None] + added


@triton.jit
def _load_more(
    rows, valid, like, MORE: tl.constexpr, MORE_TILE: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr
):
    e = tl.arange(0, MORE_TILE)
    return load_numbers(rows + e[None, :], valid[:, None] & (e < MORE)[None, :], like, KIND, NATIVE)


@triton.jit
def _load_words(words, rows, valid, row_size, first_word, heads, in_pack, KIND: tl.constexpr, PACK: tl.constexpr):
    """Scales of coded rows [1 or g, keys]: of the one head of a program, or of each query's."""
    if not KIND:
        found = 0
    elif PACK == 1:
        pointers = words + rows * (row_size // 4) + first_word + heads
        found = tl.load(pointers, mask=valid, other=0)[None, :]
    else:
        pointers = words + (rows * (row_size // 4) + first_word)[None, :] + heads[:, None]
        found = tl.load(pointers, mask=in_pack[:, None] & valid[None, :], other=0)
    return found


@triton.jit
def _scores(q, k, DOT: tl.constexpr):
    if DOT:  # the compiler would go on behind a return
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
    return scores


@triton.jit(do_not_specialize=["table_stride", "num_parts"])
def _attend(
    out,
    sums,
    queries,
    query_stride,
    pool,
    pool_words,
    buffer,
    buffer_words,
    tables,
    table_stride,
    in_place,
    skips,
    rebuilt_starts,
    key_starts,
    num_parts,
    sinks,
    scale,
    softcap,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    MORE: tl.constexpr,
    MORE_TILE: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    KEYS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_SKIPS: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """One request, pack of KV heads (or one of the `SPLITS` of a KV head's queries) and part of its keys: first those
    in place, then the rebuilt, then the others.

    Row g of the tiles is a query head, column d belongs to one KV head of the pack. A query is 0 in the columns of the
    others, and what its row gathers there is not stored. Keys have as many dimensions as values and `MORE` behind them,
    or values are the keys' first ones. Rows may be codes: then `pool` and `buffer` are bytes, which the words are too.
    """
    request, pack, part = tl.program_id(0), tl.program_id(1) // SPLITS, tl.program_id(2)
    skip = tl.load(skips + request) if HAS_SKIPS else 0
    count = tl.load(in_place + request) - skip
    rebuilt = tl.load(rebuilt_starts + request)
    front = count + tl.load(rebuilt_starts + request + 1) - rebuilt
    start = tl.load(key_starts + request)
    num_keys = front + tl.load(key_starts + request + 1) - start
    size = tl.cdiv(tl.cdiv(num_keys, num_parts), KEYS) * KEYS
    low = part * size
    high = tl.minimum(low + size, num_keys)
    g, d = tl.arange(0, ROWS), tl.arange(0, DIM_TILE)
    width: tl.constexpr = PACK * VALUE_DIM
    first_column = pack * PACK * KEY_DIM
    v_offset = KV_HEADS * KEY_DIM - pack * PACK * MORE
    each: tl.constexpr = PACK * GROUP // SPLITS
    query_heads = pack * PACK * GROUP + (tl.program_id(1) % SPLITS) * each + g
    in_pack = g < each
    kv_heads = pack if PACK == 1 else pack * PACK + g * PACK // each
    own = in_pack[:, None] & (d // VALUE_DIM == (g * PACK // each)[:, None])
    q_rows = queries + request.to(tl.int64) * query_stride + query_heads[:, None] * KEY_DIM
    q = tl.load(q_rows + (d % VALUE_DIM)[None, :], mask=own, other=0.0)
    q_more = _load_more(q_rows + VALUE_DIM, in_pack, q, MORE, MORE_TILE, 0, False)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # as if one key had been seen, without a value
        sink = tl.load(sinks + query_heads, mask=in_pack, other=float("-inf")).to(tl.float32)
        m = tl.where(part == 0, sink, float("-inf"))
        total = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([ROWS, DIM_TILE], tl.float32)
    end = tl.minimum(high, count)
    for first in range(low, end, KEYS):
        key = first + tl.arange(0, KEYS)
        valid = key < end
        token = skip + key
        block = tl.load(tables + request * table_stride + token // BLOCK_SIZE, mask=valid, other=0)
        rows = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        k_rows = pool + rows[:, None] * ROW_SIZE + first_column
        words = _load_words(pool_words, rows, valid, ROW_SIZE, FIRST_WORD, kv_heads, in_pack, KIND, PACK)
        m, total, acc = _accumulate(
            q,
            q_more,
            m,
            total,
            acc,
            k_rows,
            v_offset,
            words,
            valid,
            scale,
            softcap,
            d,
            width,
            MORE,
            MORE_TILE,
            SHARES,
            ROWS > 1,
            SOFTCAP,
            KIND,
            NATIVE,
        )
    end = tl.minimum(high, front)
    for first in range(tl.maximum(low, count), end, KEYS):
        key = first + tl.arange(0, KEYS)
        valid = key < end
        rows = (rebuilt + key - count).to(tl.int64)
        k_rows = buffer + rows[:, None] * ROW_SIZE + first_column
        words = _load_words(buffer_words, rows, valid, ROW_SIZE, FIRST_WORD, kv_heads, in_pack, KIND, PACK)
        m, total, acc = _accumulate(
            q,
            q_more,
            m,
            total,
            acc,
            k_rows,
            v_offset,
            words,
            valid,
            scale,
            softcap,
            d,
            width,
            MORE,
            MORE_TILE,
            SHARES,
            ROWS > 1,
            SOFTCAP,
            KIND,
            NATIVE,
        )
    for first in range(tl.maximum(low, front), high, KEYS):
        key = first + tl.arange(0, KEYS)
        valid = key < high
        rows = (start + key - front).to(tl.int64)
        k_rows = buffer + rows[:, None] * ROW_SIZE + first_column
        words = _load_words(buffer_words, rows, valid, ROW_SIZE, FIRST_WORD, kv_heads, in_pack, KIND, PACK)
        m, total, acc = _accumulate(
            q,
            q_more,
            m,
            total,
            acc,
            k_rows,
            v_offset,
            words,
            valid,
            scale,
            softcap,
            d,
            width,
            MORE,
            MORE_TILE,
            SHARES,
            ROWS > 1,
            SOFTCAP,
            KIND,
            NATIVE,
        )
    target = (request * num_parts + part).to(tl.int64) * (KV_HEADS * GROUP) + query_heads
    if IN_PARTS:
        tl.store(sums + 2 * target, m, mask=in_pack)
        tl.store(sums + 2 * target + 1, total, mask=in_pack)
    else:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + target[:, None] * VALUE_DIM + (d % VALUE_DIM)[None, :], acc.to(out.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["num_parts"])
def _merge(
    out,
    parts,
    sums,
    num_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PARTS_TILE: tl.constexpr,
) -> None:
    """One request and head: its parts, weighted by their sums of exponentials."""
    request, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DIM_TILE)
    part = tl.arange(0, PARTS_TILE)
    there = part < num_parts
    source = (request * num_parts + part).to(tl.int64) * HEADS + head
    m = tl.load(sums + 2 * source, mask=there, other=float("-inf"))
    max_m = tl.max(m, 0)
    weight = tl.where(m > float("-inf"), tl.exp(m - max_m), 0.0)
    total = tl.sum(weight * tl.load(sums + 2 * source + 1, mask=there, other=0.0), 0)
    inside = there[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(parts + source[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    merged = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    row = (request.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + row + d, merged.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def decode_attention(
    queries: torch.Tensor,
    pool: torch.Tensor,
    buffer: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    in_place: torch.Tensor,
    rebuilt_starts: torch.Tensor,
    key_starts: torch.Tensor,
    skips: torch.Tensor | None = None,
    heads: HeadShape,
    block_size: int,
    scale: float,
    max_keys: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    coding: Coding | None = None,
) -> None:
    """Fill `out` [d, o] for one query a request [d, q] (rows may be strided; those of `out` are not).

    Its keys are rows of `pool` [*, columns], `in_place[i]` of them in the blocks of `tables` [d, b], less the first
    `skips[i]` of these, and of `buffer` [*, columns]: rows `rebuilt_starts[i]` to `rebuilt_starts[i+1]`, and
    `key_starts[i]` to `key_starts[i+1]`. Integers are int32. `max_keys` a request bounds the parts into which keys are
    divided. A request without keys gets zeros.
    With `softcap` a score s becomes softcap * tanh(s / softcap); `sinks` [heads] are scores of keys without a value.
    `coding` says how rows are coded; None: they are numbers.
    """
    coding = coding or Coding(0, heads.row_size, 0, is_native=False)
    num_requests = len(queries)
    group = heads.num_heads // heads.num_kv_heads
    # Matrix units where they take the type as it is, though most of their rows are idle: it needs fewer registers.
    uses_dot = group > 1 or queries.dtype != torch.float32
    pack = _heads_in_a_pack(heads) if uses_dot else 1
    splits = _splits(heads) if pack == 1 else 1
    programs = heads.num_kv_heads // pack * splits
    parts = _num_parts(num_requests * programs, max_keys)
    partial, sums = out, out
    if parts > 1:
        partial = torch.empty((num_requests, parts, heads.out_size), dtype=torch.float32, device=queries.device)
        sums = torch.empty((num_requests, parts, heads.num_heads, 2), dtype=torch.float32, device=queries.device)
    rows = max(16, triton.next_power_of_2(pack * group // splits)) if uses_dot else 1
    dim_tile, more = triton.next_power_of_2(pack * heads.value_dim), heads.key_dim - heads.value_dim
    _attend[num_requests, programs, parts](
        partial,
        sums,
        queries,
        queries.stride(0),
        pool,
        coding.words(pool),
        buffer,
        coding.words(buffer),
        tables,
        tables.stride(0),
        in_place,
        in_place if skips is None else skips,
        rebuilt_starts,
        key_starts,
        parts,
        out if sinks is None else sinks,
        scale,
        softcap or 1.0,
        BLOCK_SIZE=block_size,
        KV_HEADS=heads.num_kv_heads,
        PACK=pack,
        GROUP=group,
        SPLITS=splits,
        ROWS=rows,
        KEY_DIM=heads.key_dim,
        VALUE_DIM=heads.value_dim,
        DIM_TILE=dim_tile,
        MORE=more,
        MORE_TILE=max(16, triton.next_power_of_2(more)),
        SHARES=heads.shares,
        ROW_SIZE=coding.row_size,
        FIRST_WORD=coding.first_word,
        KEYS=32 if heads.shares else 64,
        IN_PARTS=parts > 1,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        HAS_SKIPS=skips is not None,
        KIND=coding.kind,
        NATIVE=coding.is_native,
        num_warps=8 if rows * dim_tile > _WIDE_TILE else 4,
        num_stages=3 if coding.kind else 2,  # codes are half of the bytes: as many of them are on their way
    )
    if parts > 1:
        _merge[num_requests, heads.num_heads](
            out,
            partial,
            sums,
            parts,
            HEADS=heads.num_heads,
            HEAD_DIM=heads.value_dim,
            DIM_TILE=triton.next_power_of_2(heads.value_dim),
            PARTS_TILE=_MAX_PARTS,
        )


def _num_parts(num_programs: int, max_keys: int) -> int:
    return max(1, min(_PROGRAMS // max(1, num_programs), max_keys // _MIN_KEYS, _MAX_PARTS))


def _heads_in_a_pack(heads: HeadShape) -> int:
    """KV heads that fill `_PACKED_DIM` together, where all packs are alike; else 1."""
    wanted = max(1, _PACKED_DIM // heads.key_dim)
    return wanted if heads.num_kv_heads % wanted == 0 and heads.key_dim == heads.value_dim else 1


def _splits(heads: HeadShape) -> int:
    """Programs that one KV head's queries are divided among, where their wide values would not fit the registers."""
    if not heads.shares:
        return 1
    group = heads.num_heads // heads.num_kv_heads
    divisors = (each for each in range(min(group, _SPLIT_ROWS), 0, -1) if group % each == 0)
    return group // next(divisors)
