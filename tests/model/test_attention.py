"""Attention of single queries to rows in place, and of packed rows, against a dense computation in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.attention import Attention, HeadShape, InPlaceRows, PackedRows

BLOCK_SIZE = 4
NUM_BLOCKS = 12
HEADS = [
    HeadShape(2, 2, 8, 8),
    HeadShape(4, 2, 8, 8),
    HeadShape(3, 1, 8, 8),
    HeadShape(2, 2, 12, 8),
    HeadShape(4, 1, 12, 8, shares=True),
]
"""Groups of one head and of several; values narrower than keys, and that are a part of them."""


def dense(q: torch.Tensor, rows: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """[o] for one query [q] and rows of keys and values."""
    group = heads.num_heads // heads.num_kv_heads
    k, v = (part.double().repeat_interleave(group, 1) for part in heads.keys_values(rows))
    scores = torch.einsum("hd,khd->hk", q.double().unflatten(0, (heads.num_heads, heads.key_dim)), k) * 0.3
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v).flatten().float()


@pytest.mark.parametrize("heads", HEADS)
@given(
    parts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_a_query_sees_its_blocks_and_its_buffer_rows(
    heads: HeadShape, parts: list[tuple[int, int, int]], seed: int
) -> None:
    """Any mix, blocks scattered and the last one partly filled; a row of another request changes nothing."""
    parts = [(in_place, max(buffered, not in_place + front), front) for in_place, buffered, front in parts]
    random = torch.Generator().manual_seed(seed)
    attention = Attention(heads, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    rebuilt = [sum(front for *_, front in parts[:i]) for i in range(len(parts) + 1)]
    starts = [rebuilt[-1] + sum(buffered for _, buffered, _ in parts[:i]) for i in range(len(parts) + 1)]
    pool = torch.randn(NUM_BLOCKS * BLOCK_SIZE, heads.row_size, generator=random)
    kv = torch.randn(starts[-1], heads.row_size, generator=random)
    tables = torch.stack([torch.randperm(NUM_BLOCKS, generator=random)[:5] for _ in parts]).int()
    queries = torch.randn(len(parts), heads.query_size, generator=random)
    rows = InPlaceRows(
        tables=tables,
        counts=torch.tensor([count for count, *_ in parts]).int(),
        rebuilt_starts=torch.tensor(rebuilt).int(),
        key_starts=torch.tensor(starts).int(),
        max_keys=32,
    )
    found = torch.full((len(parts), heads.out_size), torch.nan)
    attention.in_place(queries, pool, kv, rows, found)
    for i, (count, *_) in enumerate(parts):
        slots = [int(tables[i, token // BLOCK_SIZE]) * BLOCK_SIZE + token % BLOCK_SIZE for token in range(count)]
        keys = torch.cat((pool[slots], kv[rebuilt[i] : rebuilt[i + 1]], kv[starts[i] : starts[i + 1]]))
        torch.testing.assert_close(found[i], dense(queries[i], keys, heads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("heads", HEADS)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=4), seed=st.integers(0, 9)
)
def test_packed_queries_see_their_own_keys_up_to_themselves(
    heads: HeadShape, window: int | None, lengths: list[tuple[int, int]], seed: int
) -> None:
    """Ragged requests of cached and new rows: causal at the end of the keys, and no further back than the window."""
    random = torch.Generator().manual_seed(seed)
    attention = Attention(heads, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    queries_at, keys_at = [0], [2]  # rows before the first request's are nobody's
    for cached, new in lengths:
        queries_at.append(queries_at[-1] + new)
        keys_at.append(keys_at[-1] + cached + new)
    queries = torch.randn(queries_at[-1], heads.query_size, generator=random)
    kv = torch.randn(keys_at[-1] + 3, heads.row_size, generator=random)
    rows = PackedRows(
        query_starts=torch.tensor(queries_at).int(),
        key_starts=torch.tensor(keys_at).int(),
        query_offsets=tuple(queries_at),
        key_offsets=tuple(keys_at),
        max_queries=max(new for _, new in lengths),
        max_keys=max(cached + new for cached, new in lengths),
    )
    found = attention.packed(queries, kv, rows, window)
    assert found.shape == (len(queries), heads.out_size)
    for request, (cached, new) in enumerate(lengths):
        for number in range(new):
            end = keys_at[request] + cached + number + 1
            start = keys_at[request] if window is None else max(keys_at[request], end - window)
            row = queries_at[request] + number
            torch.testing.assert_close(found[row], dense(queries[row], kv[start:end], heads), rtol=1e-5, atol=1e-5)
