"""From chunks to the arrays of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from hsrpc.schedule.blocks import POOLS_OF_KIND, BlockKind, PoolId
from hsrpc.schedule.step import Chunk, InPlace, Ints, Layout, MiniBatch, Rows, Runs, expand, starts
from hsrpc.schedule.windows import first_visible

IS_ACTIVATION = np.array([pool.kind is BlockKind.ACTIVATION for pool in PoolId])
"""[num_pools] whether a pool's blocks hold activations, by the pool's number."""


def pack(chunks: Sequence[Chunk], block_size: int, windows: Sequence[int | None]) -> MiniBatch:
    """Arrays of one mini-batch, with a layout for each of the model's distinct `windows`, the widest first."""
    chunks = in_order(chunks)
    counts = np.array([chunk.num_new for chunk in chunks], dtype=np.int64)
    contexts = np.array([chunk.context for chunk in chunks], dtype=np.int64)
    positions, query_starts = expand(contexts, counts), starts(counts)
    table = _read_tables(chunks, contexts, counts, block_size, windows[0])
    narrower = (table.within(_first_visible(contexts, window), block_size) for window in windows[1:])
    tables = zip(windows, (table, *narrower), strict=True)
    return MiniBatch(
        token_ids=_new_tokens(chunks),
        positions=positions,
        query_starts=query_starts,
        layouts=tuple(_lay_out(visible, counts, query_starts, block_size, window) for window, visible in tables),
        stores=_stores(table, positions, np.repeat(np.arange(len(chunks)), counts), block_size),
        sample_rows=query_starts[1:][[chunk.samples for chunk in chunks]] - 1,
    )


def in_order(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Order chunks as a mini-batch has them: those that read in place come first."""
    return tuple(sorted(chunks, key=lambda chunk: not chunk.reads_in_place))


def _lay_out(table: _Blocks, counts: Ints, query_starts: Ints, block_size: int, window: int | None) -> Layout:
    """What a mini-batch's layers with this window read of the blocks of `table`, and where.

    A request's rows are ordered KV, regenerated, new, so that copies merge; those rebuilt for single queries come
    before all others. The rows of several queries stay in order of position where a window's mask needs that.
    """
    num_in_place = int((counts == 1).sum())
    in_place, new_in_place = _in_place(table, num_in_place, len(counts), has_window=window is not None)
    is_loaded = (table.pool != PoolId.DEVICE_KV) | (table.owner >= num_in_place)
    blocks = table.select(is_loaded & (table.visible > 0))
    is_single = blocks.owner < num_in_place
    in_front = blocks.is_activation & is_single
    is_behind = blocks.is_activation if window is None else in_front
    order = np.argsort(2 * blocks.owner + is_behind + 2 * len(counts) * ~in_front, kind="stable")
    blocks, in_front = blocks.select(order), in_front[order]
    visible = blocks.visible
    behind = np.bincount(blocks.owner, visible * ~in_front, len(counts)).astype(np.int64)
    new = counts - new_in_place
    key_starts = starts(behind + new) + in_place.num_rebuilt
    targets = starts(visible)[:-1] + np.where(in_front, 0, starts(new)[blocks.owner])
    activations = blocks.is_activation
    rebuilt = blocks.select(activations)
    return Layout(
        key_starts=key_starts,
        in_place=in_place,
        new_rows=Rows(expand(query_starts[:-1], new), expand(key_starts[:-1] + behind, new)),
        kv_loads=_loads(blocks, BlockKind.KV, targets, block_size),
        activation_loads=_loads(rebuilt, BlockKind.ACTIVATION, starts(rebuilt.visible)[:-1], block_size),
        activation_rows=expand(targets[activations], rebuilt.visible),
        activation_positions=expand(rebuilt.position + rebuilt.hidden, rebuilt.visible),
    )


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
    hidden: Ints
    """Tokens at its front that lie behind the window."""

    @property
    def is_activation(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = IS_ACTIVATION[self.pool]
        return found

    @property
    def visible(self) -> Ints:
        """Tokens in it before the step that its owner's queries see."""
        return self.cached - self.hidden

    def within(self, first: Ints, block_size: int) -> _Blocks:
        """Those in which each owner sees something, from its position `first[owner]` on."""
        hidden = np.clip(first[self.owner] - self.position, 0, block_size)
        return replace(self, hidden=hidden).select(hidden < block_size)

    def select(self, chosen: npt.NDArray[np.bool_] | Ints) -> _Blocks:
        return _Blocks(*(getattr(self, item.name)[chosen] for item in fields(self)))


def _read_tables(chunks: Sequence[Chunk], contexts: Ints, counts: Ints, block_size: int, window: int | None) -> _Blocks:
    """The blocks that each chunk's attention sees or its new tokens go to, in token order; some requests keep none."""
    tables = [chunk.request.blocks for chunk in chunks]
    visible = _first_visible(contexts, window)
    first = visible // block_size
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
        hidden=np.maximum(0, visible[owner] - position),
    )


def _first_visible(contexts: Ints, window: int | None) -> Ints:
    """`first_visible` of many."""
    return np.array([first_visible(context, window) for context in contexts.tolist()], dtype=np.int64)


def _in_place(table: _Blocks, num_chunks: int, num_all: int, *, has_window: bool) -> tuple[InPlace, Ints]:
    """What the first chunks read apart; and for each of all, whether (1) or not (0) its new row is read in place."""
    end = np.searchsorted(table.owner, num_chunks)
    owner, pool, cached, filled = table.owner[:end], table.pool[:end], table.cached[:end], table.filled[:end]
    hidden = table.hidden[:end]
    rebuilt, read = IS_ACTIVATION[pool], pool == PoolId.DEVICE_KV
    rebuilt_starts = starts(np.bincount(owner, (cached - hidden) * rebuilt, num_chunks).astype(np.int64))
    lengths = np.bincount(owner[read], minlength=num_chunks)
    tables = np.zeros((num_chunks, int(lengths.max(initial=0))), dtype=np.int64)
    tables[owner[read], expand(np.zeros_like(lengths), lengths)] = table.index[:end][read]
    counts = np.bincount(owner, filled * read, num_chunks).astype(np.int64)
    new = np.bincount(owner, (filled - cached) * read, num_all).astype(np.int64)
    skips = np.bincount(owner, hidden * read, num_chunks).astype(np.int64) if has_window else None
    return InPlace(tables, counts, rebuilt_starts, skips), new


def _new_tokens(chunks: Sequence[Chunk]) -> Ints:
    tokens: list[int] = []
    for chunk in chunks:
        new = chunk.request.token_ids[chunk.context : chunk.context + chunk.num_new]
        tokens += new if chunk.previous_row is None else [chunk.previous_row]
    return np.array(tokens, dtype=np.int64)


def _loads(blocks: _Blocks, kind: BlockKind, targets: Ints, block_size: int) -> dict[PoolId, Runs]:
    sources, visible = blocks.index * block_size + blocks.hidden, blocks.visible
    loads = {}
    for pool in POOLS_OF_KIND[kind]:
        chosen = blocks.pool == pool
        if chosen.any():
            loads[pool] = merge_runs(sources[chosen], targets[chosen], visible[chosen])
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
