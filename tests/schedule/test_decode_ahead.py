"""Steps scheduled before the tokens of the step before are known: the same tokens, and no block is lost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.decode_ahead import uses_no_buffer
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler
from hsrpc.schedule.step import NO_ROWS, Chunk, InPlace, MiniBatch, SamplingRow, Scheduled, Step
from hsrpc.schedule.windows import LayerWindows, first_visible
from tests.schedule.support import assemble, sampled
from tests.schedule.test_scheduler import EOS, LIMITS, generate, next_token

BLOCKS = 40
AHEAD_LIMITS = replace(
    LIMITS, max_idle_prefill_tokens=60, max_prefill_tokens=60, buffers=replace(LIMITS.buffers, rows=100, queries=64)
)


class Pipeline:
    """Runs a scheduler as the engine does: the next step is scheduled before this one's tokens are committed."""

    def __init__(
        self, num_blocks: int, pool: PoolId = PoolId.DEVICE_KV, window: int | None = None, gpus: int = 1
    ) -> None:
        self.limits = replace(AHEAD_LIMITS, windows=LayerWindows((window,)))
        first, *others = [BlockManager({pool: num_blocks}) for _ in range(gpus)]
        self.scheduler = Scheduler(first, self.limits, [EOS], others)
        self.window = window
        self.slots: list[dict[int, tuple[int, int]]] = [{} for _ in range(gpus)]
        """Arrival and position of the token in each slot of each device's K and V."""
        self.requests: list[Request] = []
        self.num_ahead = 0
        self.num_in_vain = 0
        self.next: Scheduled | None = None
        self.sampled: list[list[int]] = [[] for _ in range(gpus)]
        """Tokens of the step before, those of each GPU."""

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        self.requests.append(Request(str(len(self.requests)), prompt, params, len(self.requests), 0.0))
        self.scheduler.add(self.requests[-1])
        return self.requests[-1]

    def step(self) -> bool:
        """One round; False when there is nothing to do."""
        scheduled = self.next or self.scheduler.schedule(1.0)
        if scheduled is None:
            return False
        self._check_sampling(scheduled)
        step = self._assemble(scheduled)
        self.next = self.scheduler.schedule_ahead(step)
        if self.next is not None:
            self.num_ahead += 1
            self._check_ahead(self.next)
        for chunks, batch in zip(scheduled.mini_batches, step.mini_batches, strict=True):
            self._compute(chunks, batch)
        self.sampled = [self._sample(scheduled.of_gpu(gpu), before) for gpu, before in enumerate(self.sampled)]
        self.num_in_vain += sum(request.finish_reason is not None for request in sampled(scheduled))
        self.scheduler.commit(scheduled.step_id, list(chain(*self.sampled)), 2.0)
        return True

    def _assemble(self, scheduled: Scheduled) -> Step:
        """As each GPU has its part."""
        parts = [assemble(scheduled.of_gpu(gpu), self.limits) for gpu in range(len(self.slots))]
        for gpu, part in enumerate(parts):
            assert part.num_sampled == len(sampled(scheduled.of_gpu(gpu)))
            assert part.is_in_place == (scheduled.is_in_place and len(part.mini_batches) == 1)
        batches = tuple(batch for part in parts for batch in part.mini_batches)
        return replace(parts[0], mini_batches=batches, is_in_place=scheduled.is_in_place)

    def _check_sampling(self, scheduled: Scheduled) -> None:
        """At its turn a step has a row for each that samples, with the tokens that there are by then."""
        rows = self.scheduler.sampling(scheduled.step_id)
        known = [
            (request.params, request.num_prompt_tokens, request.num_output_tokens) for request in sampled(scheduled)
        ]
        assert [(row.params, row.num_prompt_tokens, row.num_output_tokens) for row in rows] == known
        assert scheduled.sampling == (() if scheduled is self.next else rows)

    def _check_ahead(self, scheduled: Scheduled) -> None:
        """It is in place, its arrays are there, and the step has those."""
        step = assemble(scheduled, self.limits)
        assert step.is_ahead
        assert step.is_in_place
        assert scheduled.is_in_place
        assert step.mini_batches is scheduled.arrays
        assert step.stop is scheduled.stop

    def _compute(self, chunks: Sequence[Chunk], batch: MiniBatch) -> None:
        """Store new rows, then see that each single query finds in place the tokens that it sees, and no others."""
        owners = [chunk.request.arrival for chunk in chunks for _ in range(chunk.num_new)]
        new = list(zip(owners, batch.positions.tolist(), strict=True))
        rows, slots = batch.stores.get(PoolId.DEVICE_KV, NO_ROWS), self.slots[chunks[0].request.gpu]
        slots |= {slot: new[row] for row, slot in zip(rows.source.tolist(), rows.target.tolist(), strict=True)}
        read, size = batch.widest.in_place, self.limits.block_size
        for chunk, table, first, count in zip(chunks, read.tables, skips(read), read.counts.tolist(), strict=False):
            found = [slots[int(table[i // size]) * size + i % size] for i in range(first, count)]
            if uses_no_buffer([chunk], size):
                seen = range(first_visible(chunk.context, self.window), chunk.context + 1)
                assert found == [(chunk.request.arrival, position) for position in seen]

    def _sample(self, scheduled: Scheduled, before: Sequence[int]) -> list[int]:
        """The model: a function of the tokens computed so far, the one that the step before sampled among them."""
        tokens = []
        for chunk in scheduled.chunks:
            assert chunk.samples or scheduled.arrays is None
            if not chunk.samples:
                continue
            known = list(chunk.request.token_ids[: chunk.context])
            if chunk.previous_row is None:
                known += chunk.request.token_ids[chunk.context :]
            elif chunk.request.finish_reason is None:
                assert before[chunk.previous_row] == chunk.request.token_ids[chunk.context]
                known.append(before[chunk.previous_row])
            tokens.append(next_token(known))
        return tokens


def skips(read: InPlace) -> list[int]:
    return [0] * read.num_requests if read.skips is None else read.skips.tolist()


params = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    max_tokens=st.none() | st.integers(1, 12),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from(((), (3, 17), (9,))),
)
prompts = st.lists(st.integers(1, 49), min_size=1, max_size=9)


@given(
    requests=st.lists(st.tuples(prompts, params, st.integers(0, 6)), min_size=1, max_size=7),
    num_blocks=st.integers(6, BLOCKS),
    window=st.none() | st.integers(1, 10),
    aborted=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), max_size=3),
    gpus=st.integers(1, 3),
)
def test_tokens_are_those_of_each_request_alone(
    requests: list[tuple[list[int], SamplingParams, int]],
    num_blocks: int,
    window: int | None,
    aborted: list[tuple[int, int]],
    gpus: int,
) -> None:
    """Whoever comes, ends early or is aborted, however few blocks there are, and on how many GPUs."""
    pipeline, arrivals = Pipeline(num_blocks, window=window, gpus=gpus), sorted(requests, key=lambda item: item[2])
    for tick in range(400):
        while arrivals and arrivals[0][2] <= tick:
            pipeline.add(*arrivals.pop(0)[:2])
        for number, when in aborted:
            if when == tick and number < len(pipeline.requests):
                pipeline.scheduler.finish(str(number), FinishReason.ABORTED)
        if not pipeline.step() and not arrivals:
            break
    assert not pipeline.scheduler.has_work
    assert [blocks.num_free for blocks in pipeline.scheduler.blocks] == [num_blocks] * gpus
    for request in pipeline.requests:
        wanted = generate(list(request.token_ids[: request.num_prompt_tokens]), request.params, LIMITS.max_model_len)
        if request.finish_reason is FinishReason.ABORTED:
            assert request.token_ids == wanted[0][: request.num_tokens]
        else:
            assert (request.token_ids, request.finish_reason) == wanted


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_decode_step_but_the_first_is_ahead(gpus: int) -> None:
    """Requests that end by their length cost no step in vain, though a GPU has nothing left to do then."""
    pipeline = Pipeline(BLOCKS, gpus=gpus)
    for count in (5, 8):
        pipeline.add([1, 2, 3], greedy(count))
    while pipeline.step():
        pass
    assert (pipeline.num_ahead, pipeline.num_in_vain) == (6, 0)  # of eight: the prompts, then seven of decode


@pytest.mark.parametrize(("running", "gpus"), [(1, 1), (5, 2)])
def test_a_request_that_may_be_let_in_goes_first(running: int, gpus: int) -> None:
    """No step is scheduled ahead while somebody waits and there is a place, on whichever GPU."""
    pipeline = Pipeline(BLOCKS, gpus=gpus)
    for _ in range(running):
        pipeline.add([1, 2], greedy(9))
    for _ in range(3):
        pipeline.step()
    assert pipeline.next is not None
    late = pipeline.add([4], greedy(2))
    pipeline.step()
    assert pipeline.next is None
    pipeline.step()
    assert late.scheduled_time is not None


def test_steps_ahead_need_no_more_blocks_than_a_window() -> None:
    """A request of six blocks in a pool of three: blocks are freed while the step ahead is under way."""
    pipeline = Pipeline(3, window=5)
    pipeline.add([1, 2, 3], greedy(21))
    while pipeline.step():
        assert len(pipeline.requests[0].blocks) <= 3
    assert pipeline.requests[0].num_tokens == 24
    assert pipeline.num_ahead == 19  # of 21: the prompt, then twenty of decode
    assert pipeline.scheduler.blocks[0].num_free == 3


def test_host_blocks_and_activations_are_not_ahead() -> None:
    """Such steps use buffers, whose loads are begun step by step."""
    for pool in (PoolId.HOST_KV, PoolId.DEVICE_ACTIVATION):
        pipeline = Pipeline(BLOCKS, pool)
        request = pipeline.add([1, 2, 3], greedy(5))
        while pipeline.step():
            pass
        assert pipeline.num_ahead == 0
        assert request.num_output_tokens == 5


def test_without_free_blocks_nobody_gives_way_for_a_step_ahead() -> None:
    """The step waits until the tokens before it are known; then the one that came last gives way."""
    pipeline = Pipeline(6)
    first, last = pipeline.add([1] * 8, greedy(8)), pipeline.add([2] * 7, greedy(8))
    while pipeline.step():
        pass
    assert first.preemptions == 0
    assert last.preemptions > 0
    assert pipeline.num_in_vain == 0


class InFlight(NamedTuple):
    """A decode step and the one ahead of its tokens."""

    scheduler: Scheduler
    requests: list[Request]
    steps: tuple[Scheduled, Scheduled]

    @property
    def are_stopped(self) -> tuple[bool, bool]:
        first, second = self.steps
        return first.stop.is_set, second.stop.is_set


def two_in_flight(*max_tokens: int, params: SamplingParams | None = None) -> InFlight:
    """Requests with outputs of so many tokens, of which one each is there."""
    scheduler = Scheduler(BlockManager({PoolId.DEVICE_KV: BLOCKS}), AHEAD_LIMITS, [EOS])
    requests = [
        Request(str(number), [1, 2], params or greedy(count), number, 0.0) for number, count in enumerate(max_tokens)
    ]
    for request in requests:
        scheduler.add(request)
    prompts = scheduler.schedule(1.0)
    assert prompts is not None
    scheduler.commit(prompts.step_id, [3] * len(requests), 2.0)
    first = scheduler.schedule(2.0)
    assert first is not None
    second = scheduler.schedule_ahead(assemble(first, AHEAD_LIMITS))
    assert second is not None
    return InFlight(scheduler, requests, (first, second))


def test_two_steps_in_flight_stop_with_the_last_request_that_they_share() -> None:
    """Not while one of them is waited for."""
    found = two_in_flight(9, 9, 9)
    for request in found.requests:
        assert found.are_stopped == (False, False)
        found.scheduler.finish(request.request_id, FinishReason.ABORTED)
    assert found.are_stopped == (True, True)


def test_a_step_ahead_stops_though_the_one_before_has_another_request() -> None:
    """One that ends with the first step's token is no part of the second, so that stops with the other one."""
    found = two_in_flight(2, 9)
    last, other = found.requests
    assert found.scheduler.requests(found.steps[1].step_id) == [other]
    found.scheduler.finish(other.request_id, FinishReason.ABORTED)
    assert found.are_stopped == (False, True)
    found.scheduler.commit(found.steps[0].step_id, [5, 6], 3.0)
    assert last.finish_reason is FinishReason.MAX_TOKENS
    assert found.are_stopped == (False, True)
    found.scheduler.abandon(found.steps[1].step_id)
    assert found.scheduler.blocks[0].num_free == BLOCKS


def test_a_token_that_ends_the_last_request_stops_the_step_ahead() -> None:
    """It is known with the commit of the step before, which is forgotten by then and not flagged."""
    found = two_in_flight(9, 9, params=SamplingParams(temperature=0.0, stop_token_ids=(7,)))
    found.scheduler.commit(found.steps[0].step_id, [7, EOS], 3.0)
    assert [request.finish_reason for request in found.requests] == [FinishReason.STOP_TOKEN, FinishReason.EOS]
    assert found.are_stopped == (False, True)
    found.scheduler.abandon(found.steps[1].step_id)
    assert found.scheduler.blocks[0].num_free == BLOCKS


@pytest.mark.parametrize("ways", list(product(("commit", "abandon"), repeat=2)), ids="-".join)
def test_blocks_are_kept_until_the_last_step_that_writes_them(ways: tuple[str, str]) -> None:
    """Requests end while two steps compute them: their blocks go back with the second step, however each ends."""
    found = two_in_flight(9, 9)
    scheduler = found.scheduler
    taken = [len(request.blocks) for request in found.requests]
    assert min(taken) > 0
    for request in found.requests:
        scheduler.finish(request.request_id, FinishReason.ABORTED)
    for num_left, way, step in zip((2, 1), ways, found.steps, strict=True):
        assert [request.in_flight for request in found.requests] == [num_left] * 2
        assert [len(request.blocks) for request in found.requests] == taken
        assert scheduler.blocks[0].num_free == BLOCKS - sum(taken)
        if way == "commit":
            assert scheduler.commit(step.step_id, [5, 6], 3.0) == []
        else:
            scheduler.abandon(step.step_id)
    assert [(len(request.blocks), request.in_flight) for request in found.requests] == [(0, 0)] * 2
    assert scheduler.blocks[0].num_free == BLOCKS


def test_one_that_ends_in_flight_gives_back_its_own_blocks() -> None:
    """With the second of the steps that compute it; the other request goes on, and keeps what it has."""
    found = two_in_flight(9, 9)
    ended, other = found.requests
    taken = len(ended.blocks), len(other.blocks)
    found.scheduler.finish(ended.request_id, FinishReason.ABORTED)
    for step in found.steps:
        assert (len(ended.blocks), len(other.blocks)) == taken
        [output] = found.scheduler.commit(step.step_id, [5, 6], 3.0)
        assert (output.request, output.token_ids) == (other, (6,))
    assert (len(ended.blocks), len(other.blocks)) == (0, taken[1])
    assert found.scheduler.blocks[0].num_free == BLOCKS - taken[1]
    assert found.are_stopped == (False, False)


def test_rows_of_a_step_ahead_are_those_of_its_turn() -> None:
    """None when it is scheduled; then with the token of the step before, for its draw and its penalties."""
    params = SamplingParams(seed=11, presence_penalty=1.0, max_tokens=9, ignore_eos=True)
    found = two_in_flight(9, params=params)
    first, second = found.steps
    assert first.sampling == (SamplingRow(params, 2, 1, 11, frozenset((EOS,)), array("q", [1, 2, 3])),)
    assert second.sampling == ()
    found.scheduler.commit(first.step_id, [8], 3.0)
    rows = (SamplingRow(params, 2, 2, 11, frozenset((EOS,)), array("q", [1, 2, 3, 8])),)
    assert found.scheduler.sampling(second.step_id) == rows
