"""From works to the arrays of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsrpc.core.batch import InPlace, Ints, MiniBatch, Rows, Runs, Work, expand, starts
from hsrpc.core.blocks import POOLS_OF_KIND, BlockKind, PoolId

_EMPTY: Ints = np.empty(0, dtype=np.int64)


def first_block(context: int, block_size: int, window: int | None) -> int:
    """First block that a query at position `context` sees: 0, or the one in which the sliding window begins."""
    return 0 if window is None else max(0, context - window + 1) // block_size


def lay_out(works: Sequence[Work], block_size: int, window: int | None) -> MiniBatch:
    """Arrays of one mini-batch.

    Without a sliding window a request's rows are ordered KV, regenerated, new, so that copies merge; with one they stay
    in order of position, which the window's mask needs.
    """
    works = sorted(works, key=lambda work: not work.reads_in_place(window))
    singles = [work for work in works if work.reads_in_place(window)]
    in_place, new_in_place = _in_place(singles, block_size)
    counts = np.array([work.count for work in works], dtype=np.int64)
    contexts = np.array([work.context for work in works], dtype=np.int64)
    new = counts.copy()
    new[: len(singles)] -= new_in_place
    blocks = [_buffered_blocks(work, block_size, window) for work in works]
    cached = np.array([int(part.count.sum()) for part in blocks], dtype=np.int64)
    key_starts = starts(cached + new)
    query_starts = starts(counts)
    positions = expand(contexts, counts)
    all_blocks = _concatenate(blocks, key_starts)
    activations = all_blocks.select(*POOLS_OF_KIND[BlockKind.ACTIVATION])
    return MiniBatch(
        works=tuple(works),
        token_ids=np.concatenate([_new_tokens(work) for work in works]),
        positions=positions,
        query_starts=query_starts,
        key_starts=key_starts,
        in_place=in_place,
        new_rows=Rows(expand(query_starts[:-1], new), expand(key_starts[:-1] + cached, new)),
        kv_loads=_loads(all_blocks, BlockKind.KV, all_blocks.target, block_size),
        activation_loads=_loads(activations, BlockKind.ACTIVATION, starts(activations.count)[:-1], block_size),
        activation_rows=expand(activations.target, activations.count),
        activation_positions=expand(activations.position, activations.count),
        stores=_stores(works, positions, query_starts, block_size),
        sample_rows=np.array([query_starts[i + 1] - 1 for i, work in enumerate(works) if work.samples], dtype=np.int64),
    )


def _in_place(works: Sequence[Work], block_size: int) -> tuple[InPlace, Ints]:
    """What works of one query each read in place; and for each, whether (1) or not (0) the new row is part of it."""
    found = [_device_blocks(work, block_size) for work in works]
    tables = np.zeros((len(works), max((len(numbers) for numbers, _ in found), default=0)), dtype=np.int64)
    counts, new = np.zeros(len(works), dtype=np.int64), np.zeros(len(works), dtype=np.int64)
    for i, (work, (numbers, is_newest)) in enumerate(zip(works, found, strict=True)):
        tables[i, : len(numbers)] = numbers
        # Only the newest block may be partly filled.
        counts[i] = len(numbers) * block_size - (-(work.context + 1) % block_size if is_newest else 0)
        new[i] = is_newest
    return InPlace(tables, counts), new


def _device_blocks(work: Work, block_size: int) -> tuple[Ints, bool]:
    """Numbers of a request's KV blocks on the device, and whether the new token's block is one of them."""
    last = work.context // block_size + 1
    pools = np.frombuffer(work.request.blocks.pools, dtype=np.int8)[:last]
    chosen = pools == PoolId.DEVICE_KV
    numbers = np.frombuffer(work.request.blocks.indices, dtype=np.int64)[:last][chosen]
    return numbers, len(pools) == last and bool(chosen[-1])


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Cached blocks in buffer order, parallel arrays: pool, number, first position, tokens, first kv-buffer row."""

    pool: Ints
    index: Ints
    position: Ints
    count: Ints
    target: Ints

    def select(self, *pools: PoolId) -> _Blocks:
        chosen = np.isin(self.pool, pools)
        return _Blocks(
            self.pool[chosen], self.index[chosen], self.position[chosen], self.count[chosen], self.target[chosen]
        )


def _buffered_blocks(work: Work, block_size: int, window: int | None) -> _Blocks:
    """The blocks of one request's cached tokens that go through the buffers; targets count from its first row."""
    first, last = first_block(work.context, block_size, window), -(-work.context // block_size)
    if last <= first:
        return _Blocks(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY)
    pool = np.array(work.request.blocks.pools[first:last], dtype=np.int64)
    index = np.array(work.request.blocks.indices[first:last], dtype=np.int64)
    position = np.arange(first, last, dtype=np.int64) * block_size
    count = np.minimum(block_size, work.context - position)
    if window is None:
        order = np.argsort(pool >= PoolId.DEVICE_ACTIVATION, kind="stable")
        order = order[pool[order] != PoolId.DEVICE_KV] if work.reads_in_place(window) else order
        pool, index, position, count = pool[order], index[order], position[order], count[order]
    return _Blocks(pool, index, position, count, starts(count)[:-1])


def _concatenate(parts: Sequence[_Blocks], key_starts: Ints) -> _Blocks:
    return _Blocks(
        np.concatenate([part.pool for part in parts]),
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.position for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.target + start for part, start in zip(parts, key_starts, strict=False)]),
    )


def _new_tokens(work: Work) -> Ints:
    if work.source is not None:
        return np.array([work.source], dtype=np.int64)
    return np.array(work.request.token_ids[work.context : work.context + work.count], dtype=np.int64)


def _loads(blocks: _Blocks, kind: BlockKind, targets: Ints, block_size: int) -> dict[PoolId, Runs]:
    loads = {}
    for pool in POOLS_OF_KIND[kind]:
        chosen = blocks.pool == pool
        if chosen.any():
            loads[pool] = merge_runs(blocks.index[chosen] * block_size, targets[chosen], blocks.count[chosen])
    return loads


def merge_runs(source: Ints, target: Ints, count: Ints) -> Runs:
    """Join copies that are neighbours at both ends."""
    joins = (source[:-1] + count[:-1] == source[1:]) & (target[:-1] + count[:-1] == target[1:])
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(source[heads], target[heads], np.add.reduceat(count, heads))


def _stores(works: Sequence[Work], positions: Ints, query_starts: Ints, block_size: int) -> dict[PoolId, Rows]:
    stored = [work for work in works if len(work.request.blocks)]
    if not stored:
        return {}
    pools = np.empty(len(positions), dtype=np.int64)
    slots = np.empty(len(positions), dtype=np.int64)
    for work, start in zip(works, query_starts, strict=False):
        rows = slice(int(start), int(start) + work.count)
        blocks, offsets = np.divmod(positions[rows], block_size)
        pools[rows] = np.frombuffer(work.request.blocks.pools, dtype=np.int8)[blocks]
        slots[rows] = np.frombuffer(work.request.blocks.indices, dtype=np.int64)[blocks] * block_size + offsets
    return {pool: Rows(np.flatnonzero(pools == pool), slots[pools == pool]) for pool in PoolId if (pools == pool).any()}
