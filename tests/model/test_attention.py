"""Attention of single queries to rows in place, and of packed rows, against a dense computation in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.attention import Attention, Extras, InPlaceRows, PackedRows, beside_sinks_
from hsrpc.plan.sizes import ModelSizes

BLOCK_SIZE = 4
NUM_BLOCKS = 12
HEAD_DIM = 8


def make_sizes(num_heads: int, num_kv_heads: int) -> ModelSizes:
    return ModelSizes(
        hidden_size=num_heads * HEAD_DIM,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        ffn_size=8,
        vocab_size=8,
        context_length=64,
        compute_bytes=4,
        layers=(),
        fixed_bytes=0,
    )


def dense(
    q: torch.Tensor,
    kv: torch.Tensor,
    sizes: ModelSizes,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[q] for one query [q] and rows [K|V]."""
    group = sizes.num_heads // sizes.num_kv_heads
    k, v = (part.unflatten(1, (sizes.num_kv_heads, HEAD_DIM)) for part in kv.double().chunk(2, dim=1))
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    scores = torch.einsum("hd,khd->hk", q.double().unflatten(0, (sizes.num_heads, HEAD_DIM)), k) * 0.3
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = torch.cat((scores, sinks.double()[:, None]), 1).softmax(-1)[:, :-1]
    return torch.einsum("hk,khd->hd", weights, v).flatten().float()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@given(
    parts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=4),
    hidden=st.none() | st.lists(st.integers(0, 20), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_a_query_sees_its_blocks_and_its_buffer_rows(
    heads: tuple[int, int], parts: list[tuple[int, int, int]], hidden: list[int] | None, seed: int
) -> None:
    """Any mix, blocks scattered, the last one partly filled, the first ones hidden; nobody else's row counts."""
    parts = [(in_place, max(buffered, not in_place + front), front) for in_place, buffered, front in parts]
    sizes, random = make_sizes(*heads), torch.Generator().manual_seed(seed)
    attention = Attention(sizes, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    rebuilt = [sum(front for *_, front in parts[:i]) for i in range(len(parts) + 1)]
    starts = [rebuilt[-1] + sum(buffered for _, buffered, _ in parts[:i]) for i in range(len(parts) + 1)]
    pool = torch.randn(NUM_BLOCKS * BLOCK_SIZE, 2 * sizes.num_kv_heads * HEAD_DIM, generator=random)
    kv = torch.randn(starts[-1], 2 * sizes.num_kv_heads * HEAD_DIM, generator=random)
    tables = torch.stack([torch.randperm(NUM_BLOCKS, generator=random)[:5] for _ in parts]).int()
    queries = torch.randn(len(parts), sizes.hidden_size, generator=random)
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
    found = torch.full_like(queries, torch.nan)
    attention.in_place(queries, pool, kv, rows, found)
    for i, (count, *_) in enumerate(parts):
        tokens = range(skips[i], count)
        slots = [int(tables[i, token // BLOCK_SIZE]) * BLOCK_SIZE + token % BLOCK_SIZE for token in tokens]
        keys = torch.cat((pool[slots], kv[rebuilt[i] : rebuilt[i + 1]], kv[starts[i] : starts[i + 1]]))
        torch.testing.assert_close(found[i], dense(queries[i], keys, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=4), seed=st.integers(0, 9)
)
def test_packed_queries_see_their_own_keys_up_to_themselves(
    heads: tuple[int, int], window: int | None, lengths: list[tuple[int, int]], seed: int
) -> None:
    """Ragged requests of cached and new rows: causal at the end of the keys, and no further back than the window."""
    sizes, random = make_sizes(*heads), torch.Generator().manual_seed(seed)
    attention = Attention(sizes, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    queries_at, keys_at = [0], [2]  # rows before the first request's are nobody's
    for cached, new in lengths:
        queries_at.append(queries_at[-1] + new)
        keys_at.append(keys_at[-1] + cached + new)
    queries = torch.randn(queries_at[-1], sizes.hidden_size, generator=random)
    kv = torch.randn(keys_at[-1] + 3, 2 * sizes.num_kv_heads * HEAD_DIM, generator=random)
    rows = PackedRows(
        query_starts=torch.tensor(queries_at).int(),
        key_starts=torch.tensor(keys_at).int(),
        query_offsets=tuple(queries_at),
        key_offsets=tuple(keys_at),
        max_queries=max(new for _, new in lengths),
        max_keys=max(cached + new for cached, new in lengths),
    )
    found = attention.packed(queries, kv, rows, window)
    assert found.shape == queries.shape
    for request, (cached, new) in enumerate(lengths):
        for number in range(new):
            end = keys_at[request] + cached + number + 1
            start = keys_at[request] if window is None else max(keys_at[request], end - window)
            row = queries_at[request] + number
            torch.testing.assert_close(found[row], dense(queries[row], kv[start:end], sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("softcap", "has_sinks"), [(0.5, False), (None, True), (0.5, True)])
@pytest.mark.parametrize("window", [None, 3])
def test_scores_are_capped_and_a_sink_takes_its_part(
    softcap: float | None, has_sinks: bool, window: int | None
) -> None:
    """For chunks, and for single queries whose keys lie in place."""
    sizes = make_sizes(4, 2)
    extras = Extras(softcap, has_sinks)
    attention = Attention(sizes, 0.3, BLOCK_SIZE, torch.device("cpu"), torch.float32, extras=extras)
    torch.manual_seed(0)
    queries, kv = 3 * torch.randn(5, sizes.hidden_size), torch.randn(8, 2 * sizes.num_kv_heads * HEAD_DIM)
    sinks = torch.randn(4) if has_sinks else None
    ends = torch.empty(0).int()
    chunk = attention.packed(queries, kv, PackedRows(ends, ends, (0, 5), (0, 8), 5, 8), window, sinks)
    for i in range(5):
        seen = kv[0 if window is None else i + 4 - window : i + 4]
        torch.testing.assert_close(chunk[i], dense(queries[i], seen, sizes, softcap, sinks), rtol=1e-5, atol=1e-5)
    rows = InPlaceRows(
        tables=torch.tensor([[1]]).int(),
        counts=torch.tensor([3]).int(),
        rebuilt_starts=torch.tensor([0, 2]).int(),
        key_starts=torch.tensor([2, 3]).int(),
        max_keys=8,
    )
    found = torch.empty(1, sizes.hidden_size)
    attention.in_place(queries[:1], kv, kv, rows, found, sinks=sinks)
    wanted = dense(queries[0], torch.cat((kv[4:7], kv[:3])), sizes, softcap, sinks)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_sinks_take_their_part_afterwards() -> None:
    """From what is attended without them, and the logarithms of the sums, as flash attention gives both."""
    torch.manual_seed(0)
    scores, values, sinks = torch.randn(3, 5, 7), torch.randn(3, 7, 4), torch.randn(3)
    attended, log_sums = (scores.softmax(-1) @ values).transpose(0, 1), scores.logsumexp(-1)
    with_sinks = torch.cat((scores, sinks[:, None, None].expand(3, 5, 1)), -1).softmax(-1)[..., :-1]
    wanted = (with_sinks @ values).transpose(0, 1)
    torch.testing.assert_close(beside_sinks_(attended.contiguous(), log_sums, sinks), wanted)
