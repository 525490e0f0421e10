"""The paper's mini-batch formation, for ragged requests: each fits the buffers and balances bus and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from hsrpc.schedule.blocks import BlockKind, PoolId
from hsrpc.schedule.packing import IS_ACTIVATION
from hsrpc.schedule.step import BufferLimits, Chunk, Ints, RowCosts
from hsrpc.schedule.windows import LayerWindows, first_visible

_NO_POOL = -1


class _Bin:
    """A mini-batch being filled."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.rows = self.activation_rows = self.queries = 0
        self.bus = self.gpu = 0.0

    def fits(self, rows: int, activation_rows: int, queries: int, limits: BufferLimits) -> bool:
        return (
            self.rows + rows <= limits.rows
            and self.activation_rows + activation_rows <= limits.activation_rows
            and self.queries + queries <= limits.queries
        )


def form_mini_batches(
    chunks: Sequence[Chunk],
    block_size: int,
    limits: BufferLimits,
    costs: RowCosts,
    windows: LayerWindows,
    *,
    pool: PoolId = PoolId.DEVICE_KV,
) -> list[list[Chunk]]:
    """Divide chunks into as few mini-batches as fit the buffers, each with about the same bus and GPU time.

    Longest first into the least loaded that has room. The layers with the widest window need most of the buffers.
    `pool`: the blocks that single queries read in place.
    """
    if not chunks:
        return []
    rows_of_each = _buffer_rows(chunks, block_size, windows.widest, pool)
    sized = list(zip(chunks, *(rows.tolist() for rows in rows_of_each), strict=True))
    min_bins = _min_bins(sized, limits)
    if min_bins == 1:  # nothing to balance
        return [list(chunks)]
    sized.sort(key=lambda item: (-sum(item[1:]), item[0].request.order))
    bins = [_Bin() for _ in range(min_bins)]
    by_load = [(0.0, 0, number) for number in range(len(bins))]  # load, rows, number: a heap
    for chunk, kv_rows, rebuilt_rows, new_rows, absorbed_rows in sized:
        rows, activation_rows, full = kv_rows + rebuilt_rows + new_rows, rebuilt_rows + absorbed_rows, []
        while by_load and not bins[by_load[0][2]].fits(rows, activation_rows, chunk.num_new, limits):
            full.append(heappop(by_load))
        number = heappop(by_load)[2] if by_load else len(bins)
        if number == len(bins):
            bins.append(_Bin())
        chosen = bins[number]
        chosen.chunks.append(chunk)
        chosen.rows += rows
        chosen.activation_rows += activation_rows
        chosen.queries += chunk.num_new
        chosen.bus += kv_rows * costs.load_kv + activation_rows * costs.load_activation
        chosen.gpu += rebuilt_rows * costs.regenerate + chunk.num_new * costs.compute
        for entry in (*full, (max(chosen.bus, chosen.gpu), chosen.rows, number)):
            heappush(by_load, entry)
    return [b.chunks for b in bins if b.chunks]


def _min_bins(sized: Sequence[tuple[Chunk, int, int, int, int]], limits: BufferLimits) -> int:
    """Mini-batches that are needed if rows could be divided at will."""
    rows = sum(kv_rows + rebuilt_rows + new_rows for _, kv_rows, rebuilt_rows, new_rows, _ in sized)
    activations = sum(rebuilt_rows + absorbed_rows for _, _, rebuilt_rows, _, absorbed_rows in sized)
    queries = sum(chunk.num_new for chunk, *_ in sized)
    demands = ((rows, limits.rows), (activations, limits.activation_rows), (queries, limits.queries))
    return max(1, *(-(-amount // room) for amount, room in demands if room))


def _buffer_rows(
    chunks: Sequence[Chunk], block_size: int, window: int | None, pool: PoolId
) -> tuple[Ints, Ints, Ints, Ints]:
    """Rows of the kv buffer that each of `chunks` takes: cached as KV, cached as activations, new; and those that it
    takes of the activation buffer alone."""
    contexts = np.array([chunk.context for chunk in chunks], dtype=np.int64)
    in_place = np.array([chunk.reads_in_place for chunk in chunks])
    visible = np.array([first_visible(context, window) for context in contexts.tolist()], dtype=np.int64)
    first, last = visible // block_size, -(-contexts // block_size)
    tables = [chunk.request.blocks for chunk in chunks]
    bounds = zip(tables, first.tolist(), last.tolist(), strict=True)
    read = [table.pools[start - table.first : end - table.first] for table, start, end in bounds]
    pools = np.frombuffer(b"".join(read), dtype=np.int8)
    owner = np.repeat(np.arange(len(chunks)), last - first)
    counts = np.bincount(owner * len(PoolId) + pools, minlength=len(chunks) * len(PoolId)).reshape(-1, len(PoolId))
    counts[in_place, pool] = 0
    kv, activations = (block_size * counts[:, kind].sum(axis=1) for kind in (~IS_ACTIVATION, IS_ACTIVATION))
    newest = _pools_at(chunks, contexts // block_size)
    partly = [(newest, last * block_size - contexts)]  # the last cached block, where it is partly filled
    if window is not None:
        partly.append((_pools_at(chunks, first), visible - first * block_size))
    for at, missing in partly:
        is_loaded, is_activation = (at != _NO_POOL) & ~(in_place & (at == pool)), IS_ACTIVATION[at]
        kv -= missing * (is_loaded & ~is_activation)
        activations -= missing * (is_loaded & is_activation)
    # Where that block is partly filled, the newest token goes to it too.
    new = np.array([chunk.num_new for chunk in chunks], dtype=np.int64) - (in_place & (newest == pool))
    absorbs = in_place & (pool.kind is BlockKind.ACTIVATION)
    absorbed = (activations + new) * absorbs
    return kv, activations * ~absorbs, new * ~absorbs, absorbed


def _pools_at(chunks: Sequence[Chunk], numbers: Ints) -> Ints:
    """Pool of each request's block of that number, [num_chunks]; `_NO_POOL` where it has no such block."""
    tables = [(chunk.request.blocks, number) for chunk, number in zip(chunks, numbers.tolist(), strict=True)]
    pools = [table.pools[number - table.first] if number < table.end else _NO_POOL for table, number in tables]
    return np.array(pools, dtype=np.int64)
