"""From chunks to a step: what each mini-batch asks of a sweep, which go through a layer together, and the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.request import SamplingParams
from hsrpc.schedule.assemble import Assembler, batch_shapes, group_numbers
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.packing import pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, SamplingRow, Scheduled, StepCounts, StopFlag
from hsrpc.schedule.sweep import NOTHING_CARRIED, BatchShape, Carried, LayerPlacement, OpKind, sweep
from hsrpc.schedule.windows import NO_WINDOWS, LayerWindows
from tests.schedule.support import assert_same

BLOCK = 4
LAYERS = (LayerPlacement(bus_bytes=10), LayerPlacement(), LayerPlacement(bus_bytes=30))
ASSEMBLER = Assembler(layers=LAYERS, block_size=BLOCK, windows=NO_WINDOWS, max_queries=8)


def make_chunk(number: int, pools: Sequence[PoolId], context: int, count: int) -> Chunk:
    """A request whose last token is the last of the chunk."""
    request = Request(str(number), [number] * (context + count), SamplingParams(), number, 0.0)
    for index, pool in enumerate(pools):
        request.blocks.append(pool, 10 * number + index)
    return Chunk(request, context, count, samples=True)


def schedule(*mini_batches: tuple[Chunk, ...]) -> Scheduled:
    row = SamplingRow(SamplingParams(), num_prompt_tokens=1, num_output_tokens=0, seed=3)
    return Scheduled(step_id=7, mini_batches=mini_batches, sampling=(row,), stop=StopFlag())


@given(queries=st.lists(st.integers(1, 20), max_size=30), max_queries=st.integers(1, 20))
def test_groups_are_neighbours_as_many_as_fit(queries: list[int], max_queries: int):
    """Numbers count up from 0; a group fits or is one mini-batch; none could take the first one of the next."""
    numbers = group_numbers(queries, max_queries)
    assert len(numbers) == len(queries)
    pairs = groupby(zip(numbers, queries, strict=True), key=lambda pair: pair[0])
    groups = [(number, [count for _, count in members]) for number, members in pairs]
    assert [number for number, _ in groups] == list(range(len(groups)))
    assert all(sum(members) <= max_queries or len(members) == 1 for _, members in groups)
    for (_, members), (_, following) in pairwise(groups):
        assert sum(members) + following[0] > max_queries


def test_groups_of_an_example():
    """The room is used to its last row; what is too large for it is alone, and nothing joins it."""
    assert group_numbers([3, 5, 1, 9, 1, 7, 1], max_queries=8) == [0, 0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("pool", PoolId)
def test_a_shape_tells_what_comes_from_the_host_and_what_is_rebuilt(pool: PoolId):
    """Cached rows in a pool, and new ones that go to another: loads, rebuilding and stores are told apart."""
    is_host = pool in (PoolId.HOST_KV, PoolId.HOST_ACTIVATION)
    is_activation = pool in (PoolId.DEVICE_ACTIVATION, PoolId.HOST_ACTIVATION)
    read = pack([make_chunk(0, [pool, PoolId.DEVICE_KV], BLOCK, 2)], BLOCK, (None,))
    written = pack([make_chunk(1, [PoolId.DEVICE_KV, pool], BLOCK, 2)], BLOCK, (None,))
    fresh = pack([make_chunk(2, [pool], 0, 3)], BLOCK, (None,))
    shapes = batch_shapes([read, written, fresh], max_queries=4)
    assert shapes == (
        BatchShape(group=0, loads=is_host, rebuilds=is_activation, stores=False),
        BatchShape(group=0, loads=False, rebuilds=False, stores=is_host),
        BatchShape(group=1, loads=False, rebuilds=False, stores=is_host),
    )


@pytest.mark.parametrize("windows", [(None,), (6,), (3, None, 6, 3)])
def test_a_step_has_the_arrays_and_the_list_of_its_mini_batches(windows: tuple[int | None, ...]):
    """Each mini-batch as it is packed alone, and the sweep of their shapes behind what the step before has left."""
    parts = (
        (make_chunk(0, [PoolId.HOST_KV] * 3, 8, 1), make_chunk(1, [PoolId.DEVICE_KV] * 2, 5, 3)),
        (make_chunk(2, [PoolId.DEVICE_ACTIVATION, PoolId.HOST_ACTIVATION], 4, 2),),
        (make_chunk(3, [PoolId.HOST_ACTIVATION] * 3, 3, 7),),
    )
    distinct = sorted(set(windows), key=lambda window: -(window or 99))
    scheduled, carried = schedule(*parts), Carried(first_slot=1, loaded=(-2, -1))
    step = replace(ASSEMBLER, windows=LayerWindows(windows)).assemble(scheduled, carried)
    assert_same(step.mini_batches, tuple(pack(part, BLOCK, distinct) for part in parts))
    assert step.ops is sweep(LAYERS, batch_shapes(step.mini_batches, 8), carried)
    assert step.ops.group_starts == (0, 2)
    assert {op.batch for op in step.ops.ops if op.kind is OpKind.ATTEND} == {0, 1, 2}
    assert (step.step_id, step.sampling, step.counts) == (7, scheduled.sampling, scheduled.counts)
    assert step.stop is scheduled.stop
    assert not step.is_in_place
    assert not step.is_ahead


def test_arrays_that_are_there_are_taken():
    """A step ahead: its tokens are not known, so they could not be packed again."""
    part = (make_chunk(0, [PoolId.DEVICE_KV], 2, 1),)
    arrays = (replace(pack(part, BLOCK, (None,)), token_ids=np.array([5])),)
    step = ASSEMBLER.assemble(replace(schedule(part), arrays=arrays, is_in_place=True), NOTHING_CARRIED)
    assert step.mini_batches is arrays
    assert step.is_ahead
    assert step.is_in_place


def test_counts_tell_tokens_by_what_they_are_for():
    """A decode, a prompt's part and its end, and two that keep no cache: one that decodes and one at its prompt."""
    decode = make_chunk(0, [PoolId.HOST_KV] * 3, 8, 1)
    middle = make_chunk(1, [PoolId.HOST_KV] * 2, 0, 5)._replace(samples=False)
    single = make_chunk(2, [PoolId.HOST_KV], 3, 1)._replace(samples=False)
    last = make_chunk(3, [PoolId.HOST_KV] * 2, 4, 3)
    anew = make_chunk(4, [], 0, 7)._replace(recomputed=6)
    first = make_chunk(5, [], 0, 6)
    wanted = StepCounts(requests=6, decode=2, prefill=5 + 1 + 3 + 6, recomputed=6, context=8 + 3 + 4)
    scheduled = schedule((decode, middle), (single, last, anew), (first,))
    assert scheduled.counts == wanted
    assert ASSEMBLER.assemble(scheduled, NOTHING_CARRIED).counts == wanted
    assert wanted.decode + wanted.prefill + wanted.recomputed == sum(chunk.num_new for chunk in scheduled.chunks)
