"""What a step computes, laid out as arrays: packed rows, the copies that fill them, and where new rows are stored.

Requests are ragged, so their rows are packed one after the other. A mini-batch has two buffers on the device:

    kv buffer          one row [K|V] a token: for each request its cached tokens, then its new ones. Attention reads it.
    activation buffer  one row [h] a token cached as activation; regeneration turns it into rows of the kv buffer.

The layout is the same in every layer, because a block has the same number in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hsrpc.core.blocks import POOLS_OF_KIND, BlockKind, PoolId
from hsrpc.core.request import Request

Ints = npt.NDArray[np.int64]

_EMPTY: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part in a step: compute `count` tokens behind `context` cached ones."""

    request: Request
    context: int
    count: int
    samples: bool
    """The last of its tokens is the newest, so the step samples the next one."""

    @property
    def is_decode(self) -> bool:
        """It computes the newest token alone; otherwise it is a chunk of a prefill."""
        return self.count == 1 and self.samples


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of neighbouring rows: `count[i]` rows from slot `source[i]` of a pool to row `target[i]` of a buffer."""

    source: Ints
    target: Ints
    count: Ints

    @property
    def num_rows(self) -> int:
        return int(self.count.sum())

    def rows(self) -> Rows:
        """The same copies row by row."""
        return Rows(expand(self.source, self.count), expand(self.target, self.count))


@dataclass(frozen=True, slots=True)
class Rows:
    """Single rows: from `source[i]` to `target[i]`."""

    source: Ints
    target: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The part of a step that shares device buffers. `n` query rows of `r` requests; `m` activation rows."""

    works: tuple[Work, ...]
    token_ids: Ints
    """[n]"""
    positions: Ints
    """[n]"""
    query_starts: Ints
    """[r+1] first query row of each request, then the total."""
    key_starts: Ints
    """[r+1] first kv-buffer row of each request, then the total."""
    new_rows: Ints
    """[n] kv-buffer row of each query row."""
    kv_loads: dict[PoolId, Runs]
    activation_loads: dict[PoolId, Runs]
    activation_rows: Ints
    """[m] kv-buffer row that each activation row becomes."""
    activation_positions: Ints
    """[m]"""
    stores: dict[PoolId, Rows]
    """Query rows to pool slots."""
    sample_rows: Ints
    """Query rows whose logits are sampled, in the order of the works that sample."""

    @property
    def num_queries(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        return int(self.key_starts[-1])

    @property
    def num_activation_rows(self) -> int:
        return len(self.activation_rows)


@dataclass(slots=True)
class Step:
    """One sweep over the layers for every request in it."""

    number: int
    mini_batches: tuple[MiniBatch, ...]
    is_given_up: bool = False
    """It cannot be computed to its end."""
    works: tuple[Work, ...] = field(init=False)
    """In mini-batch order."""

    def __post_init__(self) -> None:
        self.works = tuple(work for batch in self.mini_batches for work in batch.works)

    @property
    def sampled(self) -> list[Work]:
        """The works that sample, in the order in which the executor returns tokens."""
        return [work for work in self.works if work.samples]

    @property
    def is_abandoned(self) -> bool:
        """Nobody waits for any of it any more, or it was given up."""
        return self.is_given_up or all(work.request.finish_reason is not None for work in self.works)


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Seconds a layer takes for one row of the kv buffer loaded as KV or as activation, or computed anew."""

    load_kv: float
    load_activation: float
    regenerate: float


@dataclass(frozen=True, slots=True)
class BufferLimits:
    """Rows that fit the buffers of one mini-batch."""

    rows: int
    activation_rows: int
    queries: int


class _Bin:
    """A mini-batch being filled."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.rows = self.activation_rows = self.queries = 0
        self.bus = self.gpu = 0.0

    def fits(self, rows: int, activation_rows: int, queries: int, limits: BufferLimits) -> bool:
        return (
            self.rows + rows <= limits.rows
            and self.activation_rows + activation_rows <= limits.activation_rows
            and self.queries + queries <= limits.queries
        )


def form_mini_batches(
    works: Sequence[Work], block_size: int, limits: BufferLimits, costs: RowCosts, window: int | None
) -> list[list[Work]]:
    """Divide works into as few mini-batches as fit the buffers, each with about the same bus and GPU time.

    Longest first into the least loaded that has room: the paper's mini-batch formation, for ragged requests.
    """
    sized = [(work, *_load_rows(work, block_size, window)) for work in works]
    sized.sort(key=lambda item: (-(item[1] + item[2] + item[0].count), item[0].request.order))
    bins = [_Bin() for _ in range(_fewest_bins(sized, limits))]
    for work, kv_rows, activation_rows in sized:
        rows = kv_rows + activation_rows + work.count
        fitting = [b for b in bins if b.fits(rows, activation_rows, work.count, limits)]
        if not fitting:
            bins.append(_Bin())
            fitting = bins[-1:]
        chosen = min(fitting, key=lambda b: (max(b.bus, b.gpu), b.rows))
        chosen.works.append(work)
        chosen.rows += rows
        chosen.activation_rows += activation_rows
        chosen.queries += work.count
        chosen.bus += kv_rows * costs.load_kv + activation_rows * costs.load_activation
        chosen.gpu += activation_rows * costs.regenerate
    return [b.works for b in bins if b.works]


def _fewest_bins(sized: Sequence[tuple[Work, int, int]], limits: BufferLimits) -> int:
    rows = sum(kv_rows + activation_rows + work.count for work, kv_rows, activation_rows in sized)
    activations = sum(activation_rows for _, _, activation_rows in sized)
    queries = sum(work.count for work, _, _ in sized)
    demands = ((rows, limits.rows), (activations, limits.activation_rows), (queries, limits.queries))
    return max(1, *(-(-amount // room) for amount, room in demands if room))


def _load_rows(work: Work, block_size: int, window: int | None) -> tuple[int, int]:
    """Cached rows that `work` attends to, loaded as KV and as activations."""
    first = first_block(work.context, block_size, window)
    last = -(-work.context // block_size)
    pools = work.request.blocks.pools[first:last]
    total = work.context - first * block_size if last > first else 0
    activations = sum(1 for pool in pools if pool >= PoolId.DEVICE_ACTIVATION) * block_size
    if pools and pools[-1] >= PoolId.DEVICE_ACTIVATION:
        activations -= last * block_size - work.context
    return total - activations, activations


def first_block(context: int, block_size: int, window: int | None) -> int:
    """First block that a query at position `context` sees: 0, or the one in which the sliding window begins."""
    return 0 if window is None else max(0, context - window + 1) // block_size


def lay_out(works: Sequence[Work], block_size: int, window: int | None) -> MiniBatch:
    """Arrays of one mini-batch.

    Without a sliding window a request's rows are ordered KV, regenerated, new, so that copies merge; with one they stay
    in order of position, which the window's mask needs.
    """
    counts = np.array([work.count for work in works], dtype=np.int64)
    contexts = np.array([work.context for work in works], dtype=np.int64)
    blocks = [_cached_blocks(work, block_size, window) for work in works]
    cached = np.array([int(part.count.sum()) for part in blocks], dtype=np.int64)
    key_starts = _starts(cached + counts)
    query_starts = _starts(counts)
    positions = expand(contexts, counts)
    all_blocks = _concatenate(blocks, key_starts)
    activations = all_blocks.select(*POOLS_OF_KIND[BlockKind.ACTIVATION])
    return MiniBatch(
        works=tuple(works),
        token_ids=np.concatenate([_new_tokens(work) for work in works]),
        positions=positions,
        query_starts=query_starts,
        key_starts=key_starts,
        new_rows=expand(key_starts[:-1] + cached, counts),
        kv_loads=_loads(all_blocks, BlockKind.KV, all_blocks.target, block_size),
        activation_loads=_loads(activations, BlockKind.ACTIVATION, _starts(activations.count)[:-1], block_size),
        activation_rows=expand(activations.target, activations.count),
        activation_positions=expand(activations.position, activations.count),
        stores=_stores(works, positions, query_starts, block_size),
        sample_rows=np.array([query_starts[i + 1] - 1 for i, work in enumerate(works) if work.samples], dtype=np.int64),
    )


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


def _cached_blocks(work: Work, block_size: int, window: int | None) -> _Blocks:
    """The blocks of one request's cached tokens; targets count from its first row."""
    first, last = first_block(work.context, block_size, window), -(-work.context // block_size)
    if last <= first:
        return _Blocks(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY)
    pool = np.array(work.request.blocks.pools[first:last], dtype=np.int64)
    index = np.array(work.request.blocks.indices[first:last], dtype=np.int64)
    position = np.arange(first, last, dtype=np.int64) * block_size
    count = np.minimum(block_size, work.context - position)
    if window is None:
        order = np.argsort(pool >= PoolId.DEVICE_ACTIVATION, kind="stable")
        pool, index, position, count = pool[order], index[order], position[order], count[order]
    return _Blocks(pool, index, position, count, _starts(count)[:-1])


def _concatenate(parts: Sequence[_Blocks], key_starts: Ints) -> _Blocks:
    return _Blocks(
        np.concatenate([part.pool for part in parts]),
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.position for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.target + start for part, start in zip(parts, key_starts, strict=False)]),
    )


def _new_tokens(work: Work) -> Ints:
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


def expand(starts: Ints, counts: Ints) -> Ints:
    """`starts[i], starts[i]+1, ...` `counts[i]` times, for each i in turn."""
    offsets = _starts(counts)
    return np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1], dtype=np.int64)


def _starts(counts: Ints) -> Ints:
    """Running totals from 0: [n+1]."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
