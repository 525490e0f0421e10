"""From chunks to the arrays of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hsrpc.schedule.blocks import POOLS_OF_KIND, BlockKind, PoolId
from hsrpc.schedule.step import Chunk, InPlace, Ints, MiniBatch, Rows, Runs, expand, starts

IS_ACTIVATION = np.array([pool.kind is BlockKind.ACTIVATION for pool in PoolId])
"""[num_pools] whether a pool's blocks hold activations, by the pool's number."""


def first_block(context: int, block_size: int, window: int | None) -> int:
    """First block that a query at position `context` sees: 0, or the one in which the sliding window begins."""
    return 0 if window is None else max(0, context - window + 1) // block_size


def first_blocks(contexts: Ints, block_size: int, window: int | None) -> Ints:
    """`first_block` of many."""
    return np.array([first_block(context, block_size, window) for context in contexts.tolist()], dtype=np.int64)


def pack(chunks: Sequence[Chunk], block_size: int, window: int | None, pool: PoolId = PoolId.DEVICE_KV) -> MiniBatch:
    """Arrays of one mini-batch.

    Without a sliding window a request's rows are ordered KV, regenerated, new, so that copies merge; with one they stay
    in order of position, which the window's mask needs. Those rebuilt for single queries come before all others.

    `pool`: the blocks that single queries read in place. Where it holds activations, all blocks do, and nothing is
    rebuilt for these queries: they read the front of the activation buffer, where their new rows follow the others.
    """
    chunks = in_order(chunks, window)
    num_in_place = sum(chunk.reads_in_place(window) for chunk in chunks)
    counts = np.array([chunk.num_new for chunk in chunks], dtype=np.int64)
    contexts = np.array([chunk.context for chunk in chunks], dtype=np.int64)
    positions = expand(contexts, counts)
    table = _read_tables(chunks, contexts, counts, block_size, window)
    in_place, new_in_place = _in_place(table, num_in_place, len(chunks), pool)
    is_loaded = (table.pool != pool) | (table.owner >= num_in_place)
    blocks = table.select(is_loaded & (table.cached > 0))
    in_front = blocks.is_activation & (blocks.owner < num_in_place)
    if window is None:
        order = np.argsort(2 * blocks.owner + blocks.is_activation + 2 * len(chunks) * ~in_front, kind="stable")
        blocks, in_front = blocks.select(order), in_front[order]
    behind = np.bincount(blocks.owner, blocks.cached * ~in_front, len(chunks)).astype(np.int64)
    absorbed = (counts - new_in_place) * in_place.absorbs * (np.arange(len(chunks)) < num_in_place)
    new = counts - new_in_place - absorbed
    key_starts, query_starts = starts(behind + new) + in_place.num_rebuilt, starts(counts)
    skipped = int(blocks.cached[in_front].sum()) * in_place.absorbs  # they are in no row of the kv buffer
    targets = starts(blocks.cached)[:-1] - skipped + np.where(in_front, 0, starts(new)[blocks.owner])
    activations = blocks.is_activation
    rebuilt = blocks.select(activations)
    in_buffer = starts(rebuilt.cached)[:-1] + starts(absorbed)[rebuilt.owner]
    unused = np.zeros(in_place.num_absorbed, dtype=np.int64)
    becomes, positions_of = (
        expand(first, rebuilt.cached)[skipped:] for first in (targets[activations], rebuilt.position)
    )
    return MiniBatch(
        token_ids=_new_tokens(chunks),
        positions=positions,
        query_starts=query_starts,
        key_starts=key_starts,
        in_place=in_place,
        new_rows=Rows(expand(query_starts[:-1], new), expand(key_starts[:-1] + behind, new)),
        absorbed=Rows(query_starts[:-1][absorbed > 0], in_place.rebuilt_starts[1:][absorbed[:num_in_place] > 0] - 1),
        kv_loads=_loads(blocks, BlockKind.KV, targets, block_size),
        activation_loads=_loads(rebuilt, BlockKind.ACTIVATION, in_buffer, block_size),
        activation_rows=np.concatenate((unused, becomes)),
        activation_positions=np.concatenate((unused, positions_of)),
        stores=_stores(table, positions, np.repeat(np.arange(len(chunks)), counts), block_size),
        sample_rows=query_starts[1:][[chunk.samples for chunk in chunks]] - 1,
    )


def in_order(chunks: Sequence[Chunk], window: int | None) -> tuple[Chunk, ...]:
    """Order chunks as a mini-batch has them: those that read in place come first."""
    return tuple(sorted(chunks, key=lambda chunk: not chunk.reads_in_place(window)))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of all requests of a mini-batch, parallel arrays."""

    owner: Ints
    """Number of the chunk."""
    pool: Ints
    index: Ints
    position: Ints
    """Position of the block's first token in its request."""
    cached: Ints
    """Tokens in it before the step."""
    filled: Ints
    """Tokens in it after the step."""

    @property
    def is_activation(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = IS_ACTIVATION[self.pool]
        return found

    def select(self, chosen: npt.NDArray[np.bool_] | Ints) -> _Blocks:
        return _Blocks(*(getattr(self, item.name)[chosen] for item in fields(self)))


def _read_tables(chunks: Sequence[Chunk], contexts: Ints, counts: Ints, block_size: int, window: int | None) -> _Blocks:
    """The blocks that each chunk's attention sees or its new tokens go to, in token order; some requests keep none."""
    tables = [chunk.request.blocks for chunk in chunks]
    first = first_blocks(contexts, block_size, window)
    last = np.minimum(-(-(contexts + counts) // block_size), [len(table) for table in tables])
    lengths = np.maximum(last - first, 0)
    bounds = list(zip(tables, first.tolist(), last.tolist(), strict=True))
    pools = b"".join([table.pools[start:end] for table, start, end in bounds])
    indices = b"".join([table.indices[start:end] for table, start, end in bounds])
    owner = np.repeat(np.arange(len(chunks)), lengths)
    position = expand(first, lengths) * block_size
    return _Blocks(
        owner=owner,
        pool=np.frombuffer(pools, dtype=np.int8).astype(np.int64),
        index=np.frombuffer(indices, dtype=np.int64),
        position=position,
        cached=np.clip(contexts[owner] - position, 0, block_size),
        filled=np.clip((contexts + counts)[owner] - position, 0, block_size),
    )


def _in_place(table: _Blocks, num_chunks: int, num_all: int, read_pool: PoolId) -> tuple[InPlace, Ints]:
    """What the first chunks read apart; and for each of all, whether (1) or not (0) its new row is read in place."""
    end = np.searchsorted(table.owner, num_chunks)
    owner, pool, cached, filled = table.owner[:end], table.pool[:end], table.cached[:end], table.filled[:end]
    read = pool == read_pool
    rebuilt = np.bincount(owner, cached * (IS_ACTIVATION[pool] & ~read), num_chunks).astype(np.int64)
    lengths = np.bincount(owner[read], minlength=num_chunks)
    tables = np.zeros((num_chunks, int(lengths.max(initial=0))), dtype=np.int64)
    tables[owner[read], expand(np.zeros_like(lengths), lengths)] = table.index[:end][read]
    counts = np.bincount(owner, filled * read, num_chunks).astype(np.int64)
    new = np.bincount(owner, (filled - cached) * read, num_all).astype(np.int64)
    if read_pool.kind is BlockKind.ACTIVATION:
        rebuilt += 1 - new[:num_chunks]
    return InPlace(tables, counts, starts(rebuilt), read_pool), new


def _new_tokens(chunks: Sequence[Chunk]) -> Ints:
    tokens: list[int] = []
    for chunk in chunks:
        new = chunk.request.token_ids[chunk.context : chunk.context + chunk.num_new]
        tokens += new if chunk.previous_row is None else [chunk.previous_row]
    return np.array(tokens, dtype=np.int64)


def _loads(blocks: _Blocks, kind: BlockKind, targets: Ints, block_size: int) -> dict[PoolId, Runs]:
    loads = {}
    for pool in POOLS_OF_KIND[kind]:
        chosen = blocks.pool == pool
        if chosen.any():
            loads[pool] = merge_runs(blocks.index[chosen] * block_size, targets[chosen], blocks.cached[chosen])
    return loads


def merge_runs(source: Ints, target: Ints, count: Ints) -> Runs:
    """Join copies that are neighbours at both ends."""
    joins = (source[:-1] + count[:-1] == source[1:]) & (target[:-1] + count[:-1] == target[1:])
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(source[heads], target[heads], np.add.reduceat(count, heads))


def _stores(table: _Blocks, positions: Ints, owners: Ints, block_size: int) -> dict[PoolId, Rows]:
    """Query rows of chunks `owners` to the slots of their positions."""
    # The table has each owner's blocks one behind the other, its first at the owner's first row.
    rows = np.searchsorted(table.owner, owners)
    has_blocks = rows < len(table.owner)
    has_blocks[has_blocks] = table.owner[rows[has_blocks]] == owners[has_blocks]
    kept = np.flatnonzero(has_blocks)
    rows, positions = rows[kept], positions[kept]
    rows += (positions - table.position[rows]) // block_size
    pools, slots = table.pool[rows], table.index[rows] * block_size + positions % block_size
    found = ((pool, pools == pool) for pool in PoolId)
    return {pool: Rows(kept[chosen], slots[chosen]) for pool, chosen in found if chosen.any()}
