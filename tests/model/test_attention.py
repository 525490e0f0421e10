"""Attention of single queries to rows in place, and of packed rows, against a dense computation in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.attention import Attention, Extras, HeadShape, InPlaceRows, PackedRows, beside_sinks_

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


def dense(
    q: torch.Tensor,
    rows: torch.Tensor,
    heads: HeadShape,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[o] for one query [q] and rows of keys and values."""
    group = heads.num_heads // heads.num_kv_heads
    k, v = (part.double().repeat_interleave(group, 1) for part in heads.keys_values(rows))
    scores = torch.einsum("hd,khd->hk", q.double().unflatten(0, (heads.num_heads, heads.key_dim)), k) * 0.3
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = torch.cat((scores, sinks.double()[:, None]), 1).softmax(-1)[:, :-1]
    return torch.einsum("hk,khd->hd", weights, v).flatten().float()


@pytest.mark.parametrize("heads", HEADS)
@given(
    parts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=4),
    hidden=st.none() | st.lists(st.integers(0, 20), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_a_query_sees_its_blocks_and_its_buffer_rows(
    heads: HeadShape, parts: list[tuple[int, int, int]], hidden: list[int] | None, seed: int
) -> None:
    """Any mix, blocks scattered, the last one partly filled, the first ones hidden; nobody else's row counts."""
    parts = [(in_place, max(buffered, not in_place + front), front) for in_place, buffered, front in parts]
    random = torch.Generator().manual_seed(seed)
    attention = Attention(heads, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    rebuilt = [sum(front for *_, front in parts[:i]) for i in range(len(parts) + 1)]
    starts = [rebuilt[-1] + sum(buffered for _, buffered, _ in parts[:i]) for i in range(len(parts) + 1)]
    pool = torch.randn(NUM_BLOCKS * BLOCK_SIZE, heads.row_size, generator=random)
    kv = torch.randn(starts[-1], heads.row_size, generator=random)
    tables = torch.stack([torch.randperm(NUM_BLOCKS, generator=random)[:5] for _ in parts]).int()
    queries = torch.randn(len(parts), heads.query_size, generator=random)
    sees_a_key = [buffered + front > 0 for _, buffered, front in parts]
    most = [count - (not sees) for (count, *_), sees in zip(parts, sees_a_key, strict=True)]
    skips = [min(skip, end) for skip, end in zip(hidden or [0] * 4, most, strict=False)]
    rows = InPlaceRows(
        tables=tables,
        counts=torch.tensor([count for count, *_ in parts]).int(),
        skips=None if hidden is None else torch.tensor(skips).int(),
        rebuilt_starts=torch.tensor(rebuilt).int(),
        key_starts=torch.tensor(starts).int(),
        max_keys=32,
    )
    found = torch.full((len(parts), heads.out_size), torch.nan)
    attention.in_place(queries, pool, kv, rows, found)
    for i, (count, *_) in enumerate(parts):
        tokens = range(skips[i], count)
        slots = [int(tables[i, token // BLOCK_SIZE]) * BLOCK_SIZE + token % BLOCK_SIZE for token in tokens]
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


@pytest.mark.parametrize(("softcap", "has_sinks"), [(0.5, False), (None, True), (0.5, True)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", HEADS)
def test_scores_are_capped_and_a_sink_takes_its_part(
    heads: HeadShape, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    """For chunks, and for single queries whose keys lie in place."""
    extras = Extras(softcap, has_sinks)
    attention = Attention(heads, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32, extras=extras)
    torch.manual_seed(0)
    queries, kv = 3 * torch.randn(5, heads.query_size), torch.randn(8, heads.row_size)
    sinks = torch.randn(heads.num_heads) if has_sinks else None
    ends = torch.empty(0).int()
    chunk = attention.packed(queries, kv, PackedRows(ends, ends, (0, 5), (0, 8), 5, 8), window, sinks)
    for i in range(5):
        seen = kv[0 if window is None else i + 4 - window : i + 4]
        torch.testing.assert_close(chunk[i], dense(queries[i], seen, heads, softcap, sinks), rtol=1e-5, atol=1e-5)
    rows = InPlaceRows(
        tables=torch.tensor([[1]]).int(),
        counts=torch.tensor([3]).int(),
        rebuilt_starts=torch.tensor([0, 2]).int(),
        key_starts=torch.tensor([2, 3]).int(),
        max_keys=8,
    )
    found = torch.empty(1, heads.out_size)
    attention.in_place(queries[:1], kv, kv, rows, found, sinks=sinks)
    wanted = dense(queries[0], torch.cat((kv[4:7], kv[:3])), heads, softcap, sinks)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_sinks_take_their_part_afterwards() -> None:
    """From what is attended without them, and the logarithms of the sums, as flash attention gives both."""
    torch.manual_seed(0)
    scores, values, sinks = torch.randn(3, 5, 7), torch.randn(3, 7, 4), torch.randn(3)
    attended, log_sums = (scores.softmax(-1) @ values).transpose(0, 1), scores.logsumexp(-1)
    with_sinks = torch.cat((scores, sinks[:, None, None].expand(3, 5, 1)), -1).softmax(-1)[..., :-1]
    wanted = (with_sinks @ values).transpose(0, 1)
    torch.testing.assert_close(beside_sinks_(attended.contiguous(), log_sums, sinks), wanted)
