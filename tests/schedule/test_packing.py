"""The layout of mini-batches against a plain simulation of pools and buffers, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockKind, PoolId
from hsrpc.schedule.decode_ahead import advance, uses_no_buffer
from hsrpc.schedule.mini_batches import _buffer_rows, form_mini_batches
from hsrpc.schedule.packing import in_order, merge_runs, pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import (
    BufferLimits,
    Chunk,
    InPlace,
    Layout,
    MiniBatch,
    RowCosts,
    Runs,
    Scheduled,
    StopFlag,
    expand,
)
from hsrpc.schedule.windows import NO_WINDOWS, LayerWindows, first_visible, most_blocks
from tests.schedule.support import assert_same

COSTS = RowCosts(load_kv=2.0, load_activation=1.0, regenerate=0.5)
Token = tuple[int, int]
"""(request number, position): what a slot or a buffer row holds."""


@dataclass(frozen=True)
class Case:
    """Chunks whose requests have random blocks in all four pools."""

    chunks: list[Chunk]
    block_size: int
    windows: tuple[int | None, ...]
    """The widest first."""

    def slot(self, number: int, position: int) -> tuple[PoolId, int]:
        blocks = self.chunks[number].request.blocks
        block, offset = divmod(position, self.block_size)
        entry = block - blocks.first
        return PoolId(blocks.pools[entry]), blocks.indices[entry] * self.block_size + offset

    def pools(self, new: bool = False) -> dict[tuple[PoolId, int], Token]:
        """What the pools' slots hold before the step, or also of the new tokens."""
        slots: dict[tuple[PoolId, int], Token] = {}
        for number, chunk in enumerate(self.chunks):
            first = chunk.request.blocks.first * self.block_size
            for position in range(first, chunk.context + (chunk.num_new if new else 0)):
                slots[self.slot(number, position)] = (number, position)
        return slots

    def number(self, chunk: Chunk) -> int:
        return self.chunks.index(chunk)

    @property
    def packed(self) -> list[Chunk]:
        """As a mini-batch has them."""
        singles = [chunk for chunk in self.chunks if chunk.num_new == 1]
        return singles + [chunk for chunk in self.chunks if chunk not in singles]

    @property
    def new_tokens(self) -> list[Token]:
        """By query row."""
        return [(self.number(chunk), chunk.context + i) for chunk in self.packed for i in range(chunk.num_new)]

    def attended(self, number: int, window: int | None) -> list[int]:
        """Cached positions that the first new token sees."""
        context = self.chunks[number].context
        return [p for p in range(context) if window is None or context - p < window]

    def pack(self) -> MiniBatch:
        return pack(self.chunks, self.block_size, self.windows)


def make_chunk(number: int, blocks: list[tuple[PoolId, int]], context: int, count: int, samples: bool = True) -> Chunk:
    request = Request(str(number), range(number * 1000, number * 1000 + context + count), SamplingParams(), number, 0.0)
    for pool, index in blocks:
        request.blocks.append(pool, index)
    return Chunk(request, context, count, samples)


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[PoolId] = tuple(PoolId)) -> Case:
    """Ragged chunks; block numbers are shuffled, or in order so that neighbours can merge.

    Where no layer sees all tokens, what the widest window has left may be freed.
    """
    block_size = draw(st.integers(1, 32))
    parts = draw(st.lists(st.tuples(st.integers(0, 90), st.just(1) | st.integers(1, 40)), min_size=1, max_size=5))
    lengths = [-(-(context + count) // block_size) for context, count in parts]
    spare = draw(st.integers(0, 2))
    chosen_from = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    random = draw(st.randoms(use_true_random=False))
    numbers = {pool: list(range(sum(lengths) + spare * len(parts))) for pool in PoolId}
    if draw(st.booleans()):
        for free in numbers.values():
            random.shuffle(free)
    chunks = []
    for number, ((context, count), length) in enumerate(zip(parts, lengths, strict=True)):
        chosen = [random.choice(chosen_from) for _ in range(length + spare)]
        blocks = [(pool, numbers[pool].pop(0)) for pool in chosen]
        chunks.append(make_chunk(number, blocks, context, count, samples=random.random() < 0.7))
    windows = LayerWindows(tuple(draw(st.sets(st.none() | st.integers(1, 60), min_size=1, max_size=3))))
    if draw(st.booleans()):
        for chunk in chunks:
            free_hidden(chunk, windows.widest, block_size)
    return Case(chunks, block_size, windows.distinct)


def free_hidden(chunk: Chunk, window: int | None, block_size: int) -> None:
    """The request has no more the blocks that its next token does not see."""
    table, first = chunk.request.blocks, first_visible(chunk.context, window) // block_size
    del table.pools[: first - table.first], table.indices[: first - table.first]
    table.first = first


def run_copies(loads: dict[PoolId, Runs], kind: BlockKind, slots: dict[tuple[PoolId, int], Token]) -> dict[int, Token]:
    """Buffer rows after the copies; each row is written once, from pools of the right kind."""
    buffer: dict[int, Token] = {}
    for pool, runs in loads.items():
        assert pool.kind is kind
        for source, target, count in zip(runs.source, runs.target, runs.count, strict=True):
            for i in range(count):
                assert target + i not in buffer
                buffer[int(target + i)] = slots[pool, int(source + i)]
    return buffer


def kv_buffer(case: Case, batch: Layout) -> dict[int, Token]:
    """The kv buffer as attention reads it: loaded, rebuilt from activations, and new rows."""
    slots = case.pools()
    buffer = run_copies(batch.kv_loads, BlockKind.KV, slots)
    activations = run_copies(batch.activation_loads, BlockKind.ACTIVATION, slots)
    assert sorted(activations) == list(range(len(batch.activation_rows)))
    for row, (target, position) in enumerate(zip(batch.activation_rows, batch.activation_positions, strict=True)):
        assert activations[row][1] == position
        assert target not in buffer
        buffer[int(target)] = activations[row]
    new = case.new_tokens
    for source, target in zip(batch.new_rows.source, batch.new_rows.target, strict=True):
        assert target not in buffer
        buffer[int(target)] = new[source]
    return buffer


def rows_in_place(case: Case, batch: Layout, index: int) -> list[Token]:
    """What a request reads in the pool of blocks that are read in place, the new rows stored before."""
    if index >= batch.in_place.num_requests:
        return []
    slots, table, skips = case.pools(new=True), batch.in_place.tables[index], batch.in_place.skips
    read = range(0 if skips is None else skips[index], batch.in_place.counts[index])
    assert len(read) == batch.in_place.num_visible[index]
    places = [divmod(token, case.block_size) for token in read]
    return [slots[batch.in_place.pool, int(table[block]) * case.block_size + offset] for block, offset in places]


def rebuilt_rows(batch: Layout, index: int) -> range:
    """Rows of the kv buffer, and of the activation buffer as well."""
    if index >= batch.in_place.num_requests:
        return range(0)
    starts = batch.in_place.rebuilt_starts
    return range(starts[index], starts[index + 1])


def is_activation(case: Case, token: Token) -> bool:
    return case.slot(*token)[0].kind is BlockKind.ACTIVATION


@given(case=cases())
def test_rows_in_front_are_rebuilt_where_they_are_read(case: Case):
    """Row by row from the activation buffer to the same row of the kv buffer."""
    for layout in case.pack().layouts:
        count = layout.in_place.num_rebuilt
        assert layout.activation_rows[:count].tolist() == list(range(count))
        assert all(row >= count for row in layout.activation_rows[count:])


@given(case=cases())
@settings(max_examples=150)
def test_attention_reads_exactly_what_it_must(case: Case):
    """Under each window a request's rows are the visible tokens of its first query, each once, the new ones last; those
    of several queries are in order where a window masks them."""
    layouts = case.pack().layouts
    for window, layout in zip(case.windows, layouts, strict=True):
        buffer = kv_buffer(case, layout)
        assert sorted(buffer) == list(range(layout.num_rows))
        assert (layout.in_place.skips is None) == (window is None)
        for index, chunk in enumerate(case.packed):
            check_rows(case, layout, index, chunk, window, buffer)


def check_rows(
    case: Case, layout: Layout, index: int, chunk: Chunk, window: int | None, buffer: dict[int, Token]
) -> None:
    """Those of one request."""
    number = case.number(chunk)
    behind = range(layout.key_starts[index], layout.key_starts[index + 1])
    rows = [buffer[row] for row in [*rebuilt_rows(layout, index), *behind]]
    in_place = rows_in_place(case, layout, index)
    new = [(number, chunk.context + i) for i in range(chunk.num_new)]
    wanted = [(number, position) for position in case.attended(number, window)] + new
    assert sorted(in_place + rows) == wanted
    assert all(case.slot(*token)[0] is PoolId.DEVICE_KV for token in in_place)
    if chunk.num_new > 1:
        assert in_place == []
        assert rows[len(rows) - chunk.num_new :] == new
        assert window is None or rows == wanted
    else:
        assert all(case.slot(*token)[0] is not PoolId.DEVICE_KV for token in rows)
        front = {buffer[row] for row in rebuilt_rows(layout, index)}
        assert front == {token for token in rows if token not in new and is_activation(case, token)}


@given(case=cases())
def test_a_window_changes_nothing_but_its_own_layout(case: Case):
    """Each layout is that of its window alone, but for blocks that a wider one shows; a model with one is as before."""
    batch = case.pack()
    for window, layout in zip(case.windows, batch.layouts, strict=True):
        alone = pack(case.chunks, case.block_size, (window,))
        assert_same(replace(batch, layouts=(layout,)), alone)


@given(case=cases(kinds=(PoolId.DEVICE_ACTIVATION, PoolId.HOST_ACTIVATION)))
@settings(max_examples=150)
def test_single_queries_read_activations_where_these_are_read(case: Case):
    """In blocks on the device, or at the front of the activation buffer, their new row last; others are rebuilt."""
    batch = pack(case.chunks, case.block_size, case.windows, PoolId.DEVICE_ACTIVATION)
    for window, layout in zip(case.windows, batch.layouts, strict=True):
        check_absorbed(case, layout, window)
        sizes = zip(*(buffer_rows(case, chunk, window) for chunk in case.chunks), strict=True)
        assert tuple(map(sum, sizes)) == (layout.num_rows, len(layout.activation_rows))


def check_absorbed(case: Case, batch: Layout, window: int | None) -> None:
    """What layers with this window read."""
    activations, new = run_copies(batch.activation_loads, BlockKind.ACTIVATION, case.pools()), case.new_tokens
    for source, target in zip(batch.absorbed.source, batch.absorbed.target, strict=True):
        assert target not in activations
        activations[int(target)] = new[source]
    assert sorted(activations) == list(range(len(batch.activation_rows)))
    front = batch.in_place.num_absorbed
    buffer = {int(batch.activation_rows[row]): activations[row] for row in range(front, len(activations))}
    buffer |= {int(row): new[source] for source, row in zip(batch.new_rows.source, batch.new_rows.target, strict=True)}
    assert sorted(buffer) == list(range(batch.num_rows))
    assert batch.rebuilds == (len(activations) > front)
    assert batch.in_place.num_rebuilt == 0
    for index, chunk in enumerate(case.packed):
        number, behind = case.number(chunk), range(batch.key_starts[index], batch.key_starts[index + 1])
        in_place, absorbed = rows_in_place(case, batch, index), [activations[r] for r in rebuilt_rows(batch, index)]
        wanted = [(number, position) for position in case.attended(number, window)]
        wanted += [(number, chunk.context + i) for i in range(chunk.num_new)]
        assert sorted([*in_place, *absorbed, *(buffer[row] for row in behind)]) == wanted
        if chunk.num_new == 1:
            assert not behind
            assert {case.slot(*token)[0] for token in in_place} <= {PoolId.DEVICE_ACTIVATION}
            assert {case.slot(*token)[0] for token in absorbed} <= {PoolId.HOST_ACTIVATION}


def buffer_rows(case: Case, chunk: Chunk, window: int | None) -> tuple[int, int]:
    """Rows of the kv buffer and of the activation buffer of a chunk, as mini-batches count them."""
    kinds = _buffer_rows([chunk], case.block_size, window, PoolId.DEVICE_ACTIVATION)
    kv, rebuilt, new, absorbed = (int(rows[0]) for rows in kinds)
    return kv + rebuilt + new, rebuilt + absorbed


@given(case=cases())
def test_new_tokens_are_stored_in_their_blocks(case: Case):
    """Query row by query row, position p goes to its block's slot; then the pools hold all tokens of the request."""
    batch = case.pack()
    queries = case.new_tokens
    slots = case.pools()
    stored: list[int] = []
    for pool, rows in batch.stores.items():
        for source, target in zip(rows.source, rows.target, strict=True):
            assert (pool, int(target)) not in slots
            slots[pool, int(target)] = queries[source]
            stored.append(int(source))
    assert sorted(stored) == list(range(len(queries)))
    assert slots == case.pools(new=True)


@given(case=cases())
def test_queries_are_packed_in_order_of_the_chunks(case: Case):
    """Token ids, positions, starts and sampled rows are those of the chunks; those that read in place come first."""
    batch = case.pack()
    singles = [chunk for chunk in case.chunks if chunk.num_new == 1]
    assert case.packed[: len(singles)] == singles
    assert in_order(case.chunks) == tuple(case.packed)
    assert batch.num_requests == len(case.chunks)
    assert all(layout.in_place.num_requests == len(singles) for layout in batch.layouts)
    assert batch.num_queries == sum(chunk.num_new for chunk in case.chunks)
    sampled = []
    for chunk, (start, end) in zip(case.packed, pairwise(batch.query_starts), strict=True):
        new = slice(chunk.context, chunk.context + chunk.num_new)
        assert batch.token_ids[start:end].tolist() == chunk.request.token_ids[new]
        assert batch.positions[start:end].tolist() == list(range(new.start, new.stop))
        sampled += [end - 1] if chunk.samples else []
    assert batch.query_starts[-1] == batch.num_queries
    assert batch.sample_rows.tolist() == sampled
    layouts = [array for layout in batch.layouts for array in (layout.new_rows.source, layout.activation_rows)]
    for array in (batch.token_ids, batch.positions, batch.sample_rows, *layouts):
        assert array.dtype == np.int64


@given(case=cases())
def test_what_uses_no_buffer_is_known_without_a_layout(case: Case):
    """All of it is decode, and nothing goes through the kv buffer."""
    for chunks in (case.chunks, [chunk for chunk in case.chunks if chunk.is_decode]):
        assume(chunks)
        is_freed = any(chunk.request.blocks.first for chunk in chunks)
        batch = pack(chunks, case.block_size, (case.windows[0] if is_freed else None,))
        wanted = batch.widest.num_rows == 0 and all(chunk.is_decode for chunk in chunks)
        assert uses_no_buffer(chunks, case.block_size) == wanted


@given(case=cases(), slack=st.tuples(*[st.integers(0, 60)] * 3))
@settings(max_examples=150)
def test_mini_batches_fit_and_lose_nothing(case: Case, slack: tuple[int, int, int]):
    """Every chunk is in one mini-batch, none exceeds the buffers, and what fits together is not divided."""
    alone = [measure(case, [chunk]) for chunk in case.chunks]
    limits = BufferLimits(*(max(sizes) + extra for sizes, extra in zip(zip(*alone, strict=True), slack, strict=True)))
    parts = form_mini_batches(case.chunks, case.block_size, limits, COSTS, LayerWindows(case.windows))
    ids = [chunk.request.request_id for part in parts for chunk in part]
    assert Counter(ids) == Counter(chunk.request.request_id for chunk in case.chunks)
    for part in parts:
        rows, activation_rows, queries = measure(case, part)
        assert rows <= limits.rows
        assert activation_rows <= limits.activation_rows
        assert queries <= limits.queries
    rows, activation_rows, queries = measure(case, case.chunks)
    if rows <= limits.rows and activation_rows <= limits.activation_rows and queries <= limits.queries:
        assert len(parts) == 1


def measure(case: Case, chunks: list[Chunk]) -> tuple[int, int, int]:
    """Rows, activation rows and queries, counted token by token."""
    rows = activation_rows = queries = 0
    for chunk in chunks:
        number = case.chunks.index(chunk)
        cached, new = case.attended(number, case.windows[0]), range(chunk.context, chunk.context + chunk.num_new)
        in_place = chunk.num_new == 1
        rows += sum(not (in_place and case.slot(number, p)[0] is PoolId.DEVICE_KV) for p in [*cached, *new])
        activation_rows += sum(case.slot(number, p)[0].kind is BlockKind.ACTIVATION for p in cached)
        queries += chunk.num_new
    return rows, activation_rows, queries


def test_mini_batches_balance():
    """Chunks of equal length but unlike kinds divide so that each mini-batch has the same bus time."""
    pools = [PoolId.HOST_KV, PoolId.HOST_ACTIVATION] * 6
    chunks = [make_chunk(i, [(pool, 10 * i + j) for j in range(5)], 64, 1) for i, pool in enumerate(pools)]
    limits = BufferLimits(rows=65 * 6, activation_rows=1000, queries=100)
    parts = form_mini_batches(chunks, 16, limits, COSTS, NO_WINDOWS)
    kinds = [Counter(PoolId(chunk.request.blocks.pools[0]) for chunk in part) for part in parts]
    assert kinds == [{PoolId.HOST_KV: 3, PoolId.HOST_ACTIVATION: 3}] * 2


@pytest.mark.parametrize(
    ("short", "costs"),
    [
        (PoolId.HOST_ACTIVATION, RowCosts(load_kv=1.0, load_activation=0.5, regenerate=5.0)),
        (PoolId.HOST_KV, RowCosts(load_kv=1.0, load_activation=0.0, regenerate=0.1)),
    ],
    ids=["gpu", "bus"],
)
def test_mini_batches_balance_the_longer_side(short: PoolId, costs: RowCosts):
    """Four short chunks take longer on one side than a long one on the other: each mini-batch has two of them."""
    long = PoolId.HOST_KV if short is PoolId.HOST_ACTIVATION else PoolId.HOST_ACTIVATION
    chunks = [make_chunk(i, [(short, 10 * i + j) for j in range(5)], 64, 1) for i in range(4)]
    chunks.append(make_chunk(4, [(long, 100 + j) for j in range(13)], 200, 1))
    parts = form_mini_batches(chunks, 16, BufferLimits(rows=400, activation_rows=1000, queries=100), costs, NO_WINDOWS)
    kinds = [Counter(PoolId(chunk.request.blocks.pools[0]) for chunk in part) for part in parts]
    assert [count[short] for count in kinds] == [2, 2]


@pytest.mark.parametrize("pool", [PoolId.HOST_KV, PoolId.HOST_ACTIVATION])
def test_those_that_share_go_together(pool: PoolId):
    """Three prefixes of four requests each, and four requests with none, in four mini-batches of equal time."""
    tables = [[(pool, 100 + group), (pool, 10 * group + i)] for i in range(4) for group in range(3)]
    tables += [[(pool, 200 + i), (pool, 300 + i)] for i in range(4)]
    chunks = [make_chunk(i, table, 31, 1) for i, table in enumerate(tables)]
    parts = form_mini_batches(chunks, 16, BufferLimits(rows=128, activation_rows=128, queries=4), COSTS, NO_WINDOWS)
    first = [Counter(chunk.request.blocks.indices[0] for chunk in part) for part in parts]
    assert sorted(first, key=len)[:3] == [Counter({100 + group: 4}) for group in range(3)]
    assert [len(part) for part in parts] == [4] * 4


def test_a_prefix_of_all_is_in_every_mini_batch():
    """None takes more than its share for it."""
    chunks = [make_chunk(i, [(PoolId.HOST_KV, 99), (PoolId.HOST_KV, i)], 31, 1) for i in range(12)]
    parts = form_mini_batches(chunks, 16, BufferLimits(rows=400, activation_rows=0, queries=5), COSTS, NO_WINDOWS)
    assert [len(part) for part in parts] == [4, 4, 4]


def test_a_partly_filled_activation_block_counts_as_far_as_it_is_filled():
    """Two requests of one activation row each share a buffer of two rows, though their blocks hold 16."""
    chunks = [make_chunk(i, [(PoolId.HOST_ACTIVATION, i)], 1, 1) for i in range(2)]
    parts = form_mini_batches(chunks, 16, BufferLimits(rows=4, activation_rows=2, queries=2), COSTS, NO_WINDOWS)
    assert len(parts) == 1


@st.composite
def copies(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    count = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    gaps = st.lists(st.sampled_from((0, 0, 0, 3, -7)), min_size=len(count), max_size=len(count))
    ends = []
    for gap in (draw(gaps), draw(gaps)):
        place, starts = 100, []
        for step, length in zip(gap, count, strict=True):
            starts.append(place + step)
            place += step + length
        ends.append(starts)
    return ends[0], ends[1], count


@given(copy=copies())
def test_merged_runs_copy_the_same_rows(copy: tuple[list[int], list[int], list[int]]):
    """Merging changes no row, and leaves no two neighbouring runs that could be one."""
    runs = Runs(*(np.array(part, dtype=np.int64) for part in copy))
    merged = merge_runs(runs.source, runs.target, runs.count)
    assert merged.rows().source.tolist() == [s + i for s, _, n in zip(*copy, strict=True) for i in range(n)]
    assert merged.rows().target.tolist() == [t + i for _, t, n in zip(*copy, strict=True) for i in range(n)]
    assert merged.num_rows == runs.num_rows
    source_ends, target_ends = merged.source + merged.count, merged.target + merged.count
    assert not np.any((source_ends[:-1] == merged.source[1:]) & (target_ends[:-1] == merged.target[1:]))


def test_neighbouring_blocks_travel_as_one_copy():
    """A request whose KV blocks are neighbours is one run, though activation blocks lie between them in token order."""
    pools = [PoolId.HOST_KV, PoolId.HOST_ACTIVATION] * 4
    chunk = make_chunk(0, [(pool, 5 + i // 2) for i, pool in enumerate(pools)], 31, 1)
    batch = pack([chunk], 4, (None,))
    assert [(r.source.tolist(), r.count.tolist()) for r in batch.widest.kv_loads.values()] == [([20], [16])]
    assert [(r.source.tolist(), r.count.tolist()) for r in batch.widest.activation_loads.values()] == [([20], [15])]


def test_without_blocks_nothing_is_stored():
    """Under the recompute policy there are no blocks: nothing is loaded or stored, all tokens are new."""
    batch = pack([make_chunk(0, [], 0, 7), make_chunk(1, [], 0, 3)], 16, (None,))
    assert (batch.widest.kv_loads, batch.widest.activation_loads, batch.stores) == ({}, {}, {})
    assert batch.widest.new_rows.source.tolist() == batch.widest.new_rows.target.tolist() == list(range(10))
    assert batch.widest.key_starts.tolist() == batch.query_starts.tolist() == [0, 7, 10]


@given(context=st.integers(0, 300), window=st.integers(1, 100))
def test_the_first_visible_position(context: int, window: int):
    """That of the next token's window; 0 without one."""
    visible = [p for p in range(context + 1) if context - p < window]
    assert first_visible(context, window) == visible[0]
    assert first_visible(context, None) == 0


@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("window", [1, 2, 8, 9])
@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_the_blocks_that_a_request_holds(window: int, chunk: int, block_size: int):
    """By counting, at all positions: no fewer may be planned for, and no more are ever held."""
    steps = ((first_visible(context, window), context + chunk) for context in range(60))
    held = [-(-end // block_size) - first // block_size for first, end in steps]
    assert most_blocks(window, chunk, block_size) == max(held)


def test_windows_are_told_apart():
    """The widest first, which is none at all where a layer has none; each layer knows its own."""
    windows = LayerWindows((3, None, 7, 3))
    assert windows.distinct == (None, 7, 3)
    assert windows.numbers == (2, 0, 1, 2)
    assert dict(windows.shares) == {None: 0.25, 7: 0.25, 3: 0.5}
    assert windows.widest is None
    assert LayerWindows((3, 5)).widest == 5


@given(parts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_expand_counts_up_from_each_start(parts: list[tuple[int, int]]):
    """`expand` is the concatenation of ranges."""
    starts, counts = (np.array([part[i] for part in parts], dtype=np.int64) for i in (0, 1))
    assert expand(starts, counts).tolist() == [start + i for start, count in parts for i in range(count)]


def test_a_step_lists_its_chunks_in_order():
    """In mini-batch order, as often as they are asked for."""
    chunks = [make_chunk(i, [(PoolId.HOST_KV, i)], 0, 3) for i in range(3)]
    parts = (tuple(chunks[1:]), tuple(chunks[:1]))
    step = Scheduled(step_id=1, mini_batches=parts, sampling=(), stop=StopFlag())
    for _ in range(2):
        assert list(step.chunks) == [chunks[1], chunks[2], chunks[0]]


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_block_is_copied_to_the_exact_token(count: int):
    """A block that is partly filled is loaded as far as it is filled, so that packed rows have no holes."""
    batch = pack([make_chunk(0, [(PoolId.HOST_KV, 7), (PoolId.HOST_KV, 3)], 18, count)], 16, (None,))
    runs = batch.widest.kv_loads[PoolId.HOST_KV]
    assert (runs.source.tolist(), runs.target.tolist(), runs.count.tolist()) == ([112, 48], [0, 16], [16, 2])


@pytest.mark.parametrize("pool", [PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION])
@given(
    contexts=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    block_size=st.integers(1, 20),
    ended=st.sets(st.integers(0, 5)),
    window=st.none() | st.integers(1, 40),
    frees=st.booleans(),
    shuffled=st.randoms(use_true_random=False),
)
def test_a_batch_in_place_advances_as_it_would_be_laid_out(
    pool: PoolId,
    contexts: list[int],
    block_size: int,
    ended: set[int],
    window: int | None,
    frees: bool,
    shuffled: Random,
):
    """Some requests end or begin a block, windows leave blocks, freed or not: what is read is that of a new layout."""
    free = list(range(500))
    shuffled.shuffle(free)
    chunks = []
    for number, context in enumerate(contexts):
        blocks = [(pool, free.pop()) for _ in range(context // block_size + 1)]
        chunks.append(make_chunk(number, blocks, context, 1))
    following = [
        Chunk(chunk.request, chunk.context + 1, 1, samples=True, previous_row=row)
        for row, chunk in enumerate(chunks)
        if row not in ended
    ]
    for chunk in following:
        if chunk.context == chunk.request.blocks.end * block_size:
            chunk.request.blocks.append(pool, free.pop())
    assume(following)
    for chunk in chunks * frees:
        free_hidden(chunk, window, block_size)
    found = advance(pack(chunks, block_size, (window, 1), pool), following, block_size, window)
    for chunk in following * frees:
        free_hidden(chunk, window, block_size)
    wanted = pack(following, block_size, (window,), pool)
    assert found is not None
    assert uses_no_buffer(following, block_size, pool)
    before, after = (rows_read(batch.widest.in_place, block_size) for batch in (wanted, found))
    assert before == after
    assert_same(without_in_place(found), without_in_place(wanted))
    if window is None:
        width = wanted.widest.in_place.tables.shape[1]
        assert not found.widest.in_place.tables[:, width:].any() or len(following) < len(chunks)
        trimmed = replace(found.widest.in_place, tables=found.widest.in_place.tables[:, :width])
        assert_same(trimmed, wanted.widest.in_place)


def rows_read(rows: InPlace, block_size: int) -> list[list[int]]:
    """Rows of the pool that each request reads."""
    skips = [0] * rows.num_requests if rows.skips is None else rows.skips.tolist()
    bounds = zip(rows.tables.tolist(), skips, rows.counts.tolist(), strict=True)
    return [[table[i // block_size] * block_size + i % block_size for i in range(*read)] for table, *read in bounds]


def without_in_place(batch: MiniBatch) -> MiniBatch:
    nothing = InPlace(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    return replace(batch, layouts=(replace(batch.widest, in_place=nothing),))


@pytest.mark.parametrize("pool", [PoolId.HOST_KV, PoolId.DEVICE_ACTIVATION])
def test_a_block_that_is_not_read_in_place_needs_a_new_layout(pool: PoolId):
    """The new token begins a block elsewhere: the batch is in place no more."""
    chunk = make_chunk(0, [(PoolId.DEVICE_KV, 5)], 3, 1)
    chunk.request.blocks.append(pool, 0)
    batch = pack([chunk], 4, (None,))
    assert advance(batch, [Chunk(chunk.request, 4, 1, samples=True, previous_row=0)], 4, None) is None


@given(cases(kinds=[PoolId.DEVICE_KV]))
def test_a_draft_that_lies_in_place_is_single_queries(case: Case) -> None:
    """Each sees what was stored before it, and no more: as if it were known, and a request of its own."""
    chunks = case.chunks
    drafted = [
        chunk._replace(samples=True, draft=tuple(chunk.request.token_ids[chunk.context + 1 :]), splits=True)
        for chunk in chunks
    ]
    single = [
        Chunk(chunk.request, chunk.context + i, 1, samples=True) for chunk in chunks for i in range(chunk.num_new)
    ]
    assert_same(pack(drafted, case.block_size, case.windows), pack(single, case.block_size, case.windows))
    assert uses_no_buffer(drafted, case.block_size)
    rows = _buffer_rows(drafted, case.block_size, case.windows[0], PoolId.DEVICE_KV)
    assert [part.tolist() for part in rows] == [[0] * len(chunks)] * 4
