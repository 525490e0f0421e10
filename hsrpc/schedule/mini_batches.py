"""The paper's mini-batch formation, for ragged requests: each fits the buffers and balances bus and GPU.

Requests that hold the same first block follow each other into a mini-batch until it has its fair share of the step:
what they have in common crosses the bus once there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple, TypeAlias

import numpy as np

from hsrpc.schedule.blocks import Block, BlockKind, PoolId
from hsrpc.schedule.packing import IS_ACTIVATION
from hsrpc.schedule.step import BufferLimits, Chunk, Ints, RowCosts
from hsrpc.schedule.windows import LayerWindows, first_visible

_NO_POOL = -1
_Sized: TypeAlias = tuple[Chunk, int, int, int, int]
"""A chunk, and what `_buffer_rows` has of it."""


class _Need(NamedTuple):
    """What a chunk takes of a mini-batch."""

    rows: int
    activation_rows: int
    queries: int
    bus: float
    """Seconds a layer, as `gpu`."""
    gpu: float

    @classmethod
    def of(cls, sized: _Sized, costs: RowCosts) -> _Need:
        chunk, kv_rows, rebuilt_rows, new_rows, absorbed_rows = sized
        activation_rows = rebuilt_rows + absorbed_rows
        return cls(
            rows=kv_rows + rebuilt_rows + new_rows,
            activation_rows=activation_rows,
            queries=chunk.num_new,
            bus=kv_rows * costs.load_kv + activation_rows * costs.load_activation,
            gpu=rebuilt_rows * costs.regenerate + chunk.num_new * costs.compute,
        )


class _Bin:
    """A mini-batch being filled."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.rows = self.activation_rows = self.queries = 0
        self.bus = self.gpu = 0.0

    @property
    def load(self) -> float:
        return max(self.bus, self.gpu)

    def fits(self, need: _Need, limits: BufferLimits) -> bool:
        return (
            self.rows + need.rows <= limits.rows
            and self.activation_rows + need.activation_rows <= limits.activation_rows
            and self.queries + need.queries <= limits.queries
        )

    def add(self, chunk: Chunk, need: _Need) -> None:
        self.chunks.append(chunk)
        self.rows += need.rows
        self.activation_rows += need.activation_rows
        self.queries += need.queries
        self.bus += need.bus
        self.gpu += need.gpu


class _Bins:
    """Mini-batches being filled, and the least loaded of them."""

    def __init__(self, count: int, limits: BufferLimits, fair: float) -> None:
        """`fair`: seconds that each takes where all take the same."""
        self.bins = [_Bin() for _ in range(count)]
        self._limits = limits
        self._fair = fair
        self._homes: dict[Block, int] = {}
        """Where a request went that begins with this block."""
        self._by_load = [(0.0, 0, number) for number in range(count)]
        """Load, rows and number: a heap, in which some are outdated."""

    def add(self, chunk: Chunk, need: _Need, shared: Block | None) -> None:
        """Put a chunk where another is that begins with the block `shared`, else into the least loaded with room."""
        number = self._home(need, shared)
        if number is None:
            number = self._least_loaded(need)
        chosen = self.bins[number]
        chosen.add(chunk, need)
        heappush(self._by_load, (chosen.load, chosen.rows, number))
        if shared is not None:
            self._homes[shared] = number

    def _home(self, need: _Need, shared: Block | None) -> int | None:
        number = None if shared is None else self._homes.get(shared)
        if number is None:
            return None
        home = self.bins[number]
        is_fair = max(home.bus + need.bus, home.gpu + need.gpu) <= self._fair
        return number if is_fair and home.fits(need, self._limits) else None

    def _least_loaded(self, need: _Need) -> int:
        """The number of that one; a new one's where none has room."""
        full, found = [], len(self.bins)
        while found == len(self.bins) and self._by_load:
            entry = load, rows, number = heappop(self._by_load)
            least = self.bins[number]
            if (load, rows) != (least.load, least.rows):
                continue
            if least.fits(need, self._limits):
                found = number
            else:
                full.append(entry)
        for entry in full:
            heappush(self._by_load, entry)
        if found == len(self.bins):
            self.bins.append(_Bin())
        return found


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

    Longest first into the least loaded that has room, or to another that holds the same first block. The layers with
    the widest window need most of the buffers. `pool`: the blocks that single queries read in place.
    """
    if not chunks:
        return []
    rows_of_each = _buffer_rows(chunks, block_size, windows.widest, pool)
    sized = list(zip(chunks, *(rows.tolist() for rows in rows_of_each), strict=True))
    min_bins = _min_bins(sized, limits)
    if min_bins == 1:  # nothing to balance
        return [list(chunks)]
    sized.sort(key=lambda item: (-sum(item[1:]), item[0].request.order))
    needs = [_Need.of(each, costs) for each in sized]
    fair = max(sum(need.bus for need in needs), sum(need.gpu for need in needs)) / min_bins
    bins, shared = _Bins(min_bins, limits, fair), _shared_blocks(chunks, pool)
    for (chunk, *_), need in zip(sized, needs, strict=True):
        bins.add(chunk, need, shared.get(chunk.request.request_id))
    return [each.chunks for each in bins.bins if each.chunks]


def _shared_blocks(chunks: Sequence[Chunk], pool: PoolId) -> dict[str, Block]:
    """By request, the first block of each that others of the chunks hold too; those read in place are no matter."""
    tables = {chunk.request.request_id: chunk.request.blocks for chunk in chunks if chunk.context}
    first = {name: table.block(table.first) for name, table in tables.items() if len(table)}
    count = Counter(first.values())
    return {name: block for name, block in first.items() if count[block] > 1 and block.pool is not pool}


def _min_bins(sized: Sequence[_Sized], limits: BufferLimits) -> int:
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
    new = np.array([0 if chunk.splits else chunk.num_new for chunk in chunks], dtype=np.int64)
    new -= (new == 1) & (newest == pool)
    absorbs = in_place & (pool.kind is BlockKind.ACTIVATION)
    absorbed = (activations + new) * absorbs
    return kv, activations * ~absorbs, new * ~absorbs, absorbed


def _pools_at(chunks: Sequence[Chunk], numbers: Ints) -> Ints:
    """Pool of each request's block of that number, [num_chunks]; `_NO_POOL` where it has no such block."""
    tables = [(chunk.request.blocks, number) for chunk, number in zip(chunks, numbers.tolist(), strict=True)]
    pools = [table.pools[number - table.first] if number < table.end else _NO_POOL for table, number in tables]
    return np.array(pools, dtype=np.int64)
