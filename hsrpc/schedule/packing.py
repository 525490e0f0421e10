"""From chunks to the arrays of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hsrpc.schedule.blocks import POOLS_OF_KIND, BlockKind, PoolId
from hsrpc.schedule.step import NO_ROWS, Chunk, InPlace, Ints, Layout, MiniBatch, Rows, Runs, Scores, expand, starts
from hsrpc.schedule.windows import first_visible

IS_ACTIVATION = np.array([pool.kind is BlockKind.ACTIVATION for pool in PoolId])
"""[num_pools] whether a pool's blocks hold activations, by the pool's number."""


def pack(
    chunks: Sequence[Chunk], block_size: int, windows: Sequence[int | None], pool: PoolId = PoolId.DEVICE_KV
) -> MiniBatch:
    """Arrays of one mini-batch, with a layout for each of the model's distinct `windows`, the widest first.

    `pool`: the blocks that single queries read in place. Where it holds activations, all blocks do, and nothing is
    rebuilt for these queries: they read the front of the activation buffer, where their new rows follow the others.
    """
    chunks = [part for chunk in in_order(chunks) for part in chunk.parts]
    counts = np.array([chunk.num_new for chunk in chunks], dtype=np.int64)
    contexts = np.array([chunk.context for chunk in chunks], dtype=np.int64)
    positions, query_starts = expand(contexts, counts), starts(counts)
    table = _read_tables(chunks, contexts, counts, block_size, windows[0])
    seen = ((table.within(contexts, window), window) for window in windows)
    return MiniBatch(
        token_ids=_new_tokens(chunks),
        positions=positions,
        query_starts=query_starts,
        layouts=tuple(_lay_out(each, counts, query_starts, block_size, window, pool=pool) for each, window in seen),
        stores=_stores(table, positions, np.repeat(np.arange(len(chunks)), counts), block_size),
        sample_rows=_sample_rows(chunks, query_starts),
        scores=_scores(chunks, query_starts),
    )


def in_order(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Order chunks as a mini-batch has them: those that read in place come first."""
    return tuple(sorted(chunks, key=lambda chunk: not chunk.reads_in_place))


def _lay_out(
    table: _Blocks, counts: Ints, query_starts: Ints, block_size: int, window: int | None, *, pool: PoolId
) -> Layout:
    """What a mini-batch's layers with this window read of the blocks of `table`, and where.

    A request's rows are ordered KV, regenerated, new, so that copies merge; those rebuilt for single queries come
    before all others. The rows of several queries stay in order of position where a window's mask needs that.
    """
    num_in_place = int((counts == 1).sum())
    is_in_place = table.owner < num_in_place
    is_loaded = ((table.pool != pool) | ~is_in_place) & (table.cached > 0)
    absorbs = pool.kind is BlockKind.ACTIVATION
    copied_from = _copied_from(table, is_loaded & ~(is_in_place & absorbs), block_size)
    in_place, new_in_place = _in_place(
        table, num_in_place, len(counts), block_size, window, read_pool=pool, is_copied=copied_from >= 0
    )
    loaded = np.flatnonzero(is_loaded)
    owner, is_copied = table.owner[loaded], copied_from[loaded] >= 0
    activations = IS_ACTIVATION[table.pool[loaded]]
    in_front = activations & (owner < num_in_place) & ~is_copied
    is_behind = activations if window is None else in_front
    order = np.argsort(2 * owner + is_behind + 2 * len(counts) * ~in_front, kind="stable")
    blocks, in_front, is_copied = table.select(loaded[order]), in_front[order], is_copied[order]
    activations = activations[order] & ~is_copied
    behind = np.bincount(blocks.owner, blocks.cached * ~in_front, len(counts)).astype(np.int64)
    absorbed = (counts - new_in_place) * in_place.absorbs * (np.arange(len(counts)) < num_in_place)
    new = counts - new_in_place - absorbed
    key_starts = starts(behind + new) + in_place.num_rebuilt
    skipped = int(blocks.cached[in_front].sum()) * in_place.absorbs  # they are in no row of the kv buffer
    targets = starts(blocks.cached)[:-1] - skipped + np.where(in_front, 0, starts(new)[blocks.owner])
    target_of = np.zeros(len(table.owner), dtype=np.int64)
    target_of[loaded[order]] = targets
    sources = target_of[copied_from[loaded[order][is_copied]]]
    rebuilt, copied = blocks.select(activations), blocks.cached[is_copied]
    in_buffer = starts(rebuilt.cached)[:-1] + starts(absorbed)[rebuilt.owner]
    unused = np.zeros(in_place.num_absorbed, dtype=np.int64)
    becomes, positions = (expand(first, rebuilt.cached)[skipped:] for first in (targets[activations], rebuilt.position))
    return Layout(
        key_starts=key_starts,
        in_place=in_place,
        new_rows=Rows(expand(query_starts[:-1], new), expand(key_starts[:-1] + behind, new)),
        absorbed=Rows(query_starts[:-1][absorbed > 0], in_place.rebuilt_starts[1:][absorbed[:num_in_place] > 0] - 1),
        kv_loads=_loads(blocks.select(~is_copied), BlockKind.KV, targets[~is_copied]),
        activation_loads=_loads(rebuilt, BlockKind.ACTIVATION, in_buffer),
        activation_rows=np.concatenate((unused, becomes)),
        activation_positions=np.concatenate((unused, positions)),
        copies=Rows(expand(sources, copied), expand(targets[is_copied], copied)) if len(copied) else NO_ROWS,
    )


def _copied_from(table: _Blocks, chosen: npt.NDArray[np.bool_], block_size: int) -> Ints:
    """For each block that is `chosen`, and was for an owner before, the number of the first such; -1 of all others."""
    found = np.full(len(table.owner), -1, dtype=np.int64)
    numbers = np.flatnonzero(chosen)
    what = (table.slot[numbers] * len(PoolId) + table.pool[numbers]) * (block_size + 1) + table.cached[numbers]
    _, first, which = np.unique(what, return_index=True, return_inverse=True)
    is_copied = numbers[first][which] != numbers
    found[numbers[is_copied]] = numbers[first][which[is_copied]]
    return found


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of all requests of a mini-batch, or what their owners' queries see of them: parallel arrays."""

    owner: Ints
    """Number of the chunk."""
    pool: Ints
    slot: Ints
    """Slot of the first visible token in its pool."""
    position: Ints
    """Position of that token in its request."""
    cached: Ints
    """Visible tokens before the step."""
    filled: Ints
    """Visible tokens after the step."""

    def select(self, chosen: npt.NDArray[np.bool_] | Ints) -> _Blocks:
        return _Blocks(*(getattr(self, item.name)[chosen] for item in fields(self)))

    def within(self, contexts: Ints, window: int | None) -> _Blocks:
        """What queries at these positions, one for each owner, see with this window."""
        if window is None:
            return self
        hidden = np.maximum(0, (contexts - window + 1)[self.owner] - self.position)
        cut = _Blocks(
            owner=self.owner,
            pool=self.pool,
            slot=self.slot + hidden,
            position=self.position + hidden,
            cached=self.cached - hidden,
            filled=self.filled - hidden,
        )
        return cut.select(cut.filled > 0)


def _read_tables(chunks: Sequence[Chunk], contexts: Ints, counts: Ints, block_size: int, window: int | None) -> _Blocks:
    """The blocks that each chunk's attention sees or its new tokens go to, in token order; some requests keep none."""
    tables = [chunk.request.blocks for chunk in chunks]
    first = np.array([first_visible(context, window) // block_size for context in contexts.tolist()], dtype=np.int64)
    last = np.minimum(-(-(contexts + counts) // block_size), [table.end for table in tables])
    lengths = np.maximum(last - first, 0)
    kept = [table.first for table in tables]
    bounds = list(zip(tables, (first - kept).tolist(), (last - kept).tolist(), strict=True))
    pools = b"".join([table.pools[start:end] for table, start, end in bounds])
    indices = b"".join([table.indices[start:end] for table, start, end in bounds])
    owner = np.repeat(np.arange(len(chunks)), lengths)
    position = expand(first, lengths) * block_size
    return _Blocks(
        owner=owner,
        pool=np.frombuffer(pools, dtype=np.int8).astype(np.int64),
        slot=np.frombuffer(indices, dtype=np.int64) * block_size,
        position=position,
        cached=np.clip(contexts[owner] - position, 0, block_size),
        filled=np.clip((contexts + counts)[owner] - position, 0, block_size),
    )


def _in_place(
    table: _Blocks,
    num_chunks: int,
    num_all: int,
    block_size: int,
    window: int | None,
    *,
    read_pool: PoolId,
    is_copied: npt.NDArray[np.bool_],
) -> tuple[InPlace, Ints]:
    """What the first chunks read apart; and for each of all, whether (1) or not (0) its new row is read in place."""
    end = np.searchsorted(table.owner, num_chunks)
    owner, pool, cached, filled = table.owner[:end], table.pool[:end], table.cached[:end], table.filled[:end]
    read = pool == read_pool
    is_rebuilt = IS_ACTIVATION[pool] & ~read & ~is_copied[:end]
    rebuilt = np.bincount(owner, cached * is_rebuilt, num_chunks).astype(np.int64)
    lengths = np.bincount(owner[read], minlength=num_chunks)
    tables = np.zeros((num_chunks, int(lengths.max(initial=0))), dtype=np.int64)
    tables[owner[read], expand(np.zeros_like(lengths), lengths)] = table.slot[:end][read] // block_size
    counts = np.bincount(owner, filled * read, num_chunks).astype(np.int64)
    new = np.bincount(owner, (filled - cached) * read, num_all).astype(np.int64)
    if read_pool.kind is BlockKind.ACTIVATION:
        rebuilt += 1 - new[:num_chunks]
    if window is None:
        return InPlace(tables, counts, starts(rebuilt), pool=read_pool), new
    skips = np.bincount(owner, table.slot[:end] % block_size * read, num_chunks).astype(np.int64)
    return InPlace(tables, counts + skips, starts(rebuilt), skips, read_pool), new


def _new_tokens(chunks: Sequence[Chunk]) -> Ints:
    tokens: list[int] = []
    for chunk in chunks:
        known = chunk.context + chunk.num_new - len(chunk.draft)
        new = chunk.request.token_ids[chunk.context : known]
        tokens += new if chunk.previous_row is None else [chunk.previous_row]
        tokens += chunk.draft
    return np.array(tokens, dtype=np.int64)


def _sample_rows(chunks: Sequence[Chunk], query_starts: Ints) -> Ints:
    """The last rows of each chunk."""
    sampled = np.array([chunk.num_sampled for chunk in chunks], dtype=np.int64)
    return expand(query_starts[1:] - sampled, sampled)


def _scores(chunks: Sequence[Chunk], query_starts: Ints) -> Scores | None:
    """What is wanted of the prompt tokens behind the queries."""
    asking = [(chunk, scored, i) for i, chunk in enumerate(chunks) if (scored := chunk.scored)]
    if not asking:
        return None
    rows = [query_starts[i] + np.arange(scored.start, scored.stop) - chunk.context - 1 for chunk, scored, i in asking]
    tokens = [chunk.request.token_ids[scored.start : scored.stop] for chunk, scored, _ in asking]
    tops = [np.full(len(scored), chunk.request.params.prompt_logprobs) for chunk, scored, _ in asking]
    return Scores(*(np.concatenate(part).astype(np.int64) for part in (rows, tokens, tops)))


def _loads(blocks: _Blocks, kind: BlockKind, targets: Ints) -> dict[PoolId, Runs]:
    loads = {}
    for pool in POOLS_OF_KIND[kind]:
        chosen = blocks.pool == pool
        if chosen.any():
            loads[pool] = merge_runs(blocks.slot[chosen], targets[chosen], blocks.cached[chosen])
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
    pools, slots = table.pool[rows], table.slot[rows] + positions % block_size
    found = ((pool, pools == pool) for pool in PoolId)
    return {pool: Rows(kept[chosen], slots[chosen]) for pool, chosen in found if chosen.any()}
