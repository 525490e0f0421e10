"""Steps scheduled before the tokens of the step before are known: the same tokens, and no block is lost."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler
from hsrpc.schedule.step import Scheduled
from tests.schedule.support import assemble, sampled
from tests.schedule.test_scheduler import EOS, LIMITS, generate, next_token

BLOCKS = 40
AHEAD_LIMITS = replace(
    LIMITS, max_idle_prefill_tokens=60, max_prefill_tokens=60, buffers=replace(LIMITS.buffers, rows=100, queries=64)
)


class Pipeline:
    """Runs a scheduler as the engine does: the next step is scheduled before this one's tokens are committed."""

    def __init__(self, num_blocks: int, pool: PoolId = PoolId.DEVICE_KV) -> None:
        self.scheduler = Scheduler(BlockManager({pool: num_blocks}), AHEAD_LIMITS, [EOS])
        self.requests: list[Request] = []
        self.num_ahead = 0
        self.num_in_vain = 0
        self.next: Scheduled | None = None
        self.sampled: list[int] = []

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
        self.next = self.scheduler.schedule_ahead(assemble(scheduled, AHEAD_LIMITS))
        if self.next is not None:
            self.num_ahead += 1
            self._check_ahead(self.next)
        self.sampled = self._sample(scheduled)
        self.num_in_vain += sum(request.finish_reason is not None for request in sampled(scheduled))
        self.scheduler.commit(scheduled.step_id, self.sampled, 2.0)
        return True

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
        step = assemble(scheduled, AHEAD_LIMITS)
        assert step.is_ahead
        assert step.is_in_place
        assert scheduled.is_in_place
        assert step.mini_batches is scheduled.arrays
        assert step.stop is scheduled.stop

    def _sample(self, scheduled: Scheduled) -> list[int]:
        """The model: a function of the tokens computed so far, the one that the step before sampled among them."""
        before, tokens = self.sampled, []
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
    aborted=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), max_size=3),
)
def test_tokens_are_those_of_each_request_alone(
    requests: list[tuple[list[int], SamplingParams, int]], num_blocks: int, aborted: list[tuple[int, int]]
) -> None:
    """Whoever comes, ends early or is aborted, and however few blocks there are."""
    pipeline, arrivals = Pipeline(num_blocks), sorted(requests, key=lambda item: item[2])
    for tick in range(400):
        while arrivals and arrivals[0][2] <= tick:
            pipeline.add(*arrivals.pop(0)[:2])
        for number, when in aborted:
            if when == tick and number < len(pipeline.requests):
                pipeline.scheduler.finish(str(number), FinishReason.ABORTED)
        if not pipeline.step() and not arrivals:
            break
    assert not pipeline.scheduler.has_work
    assert pipeline.scheduler.blocks.num_free == num_blocks
    for request in pipeline.requests:
        wanted = generate(list(request.token_ids[: request.num_prompt_tokens]), request.params, LIMITS.max_model_len)
        if request.finish_reason is FinishReason.ABORTED:
            assert request.token_ids == wanted[0][: request.num_tokens]
        else:
            assert (request.token_ids, request.finish_reason) == wanted


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def test_every_decode_step_but_the_first_is_ahead() -> None:
    """Requests that end by their length cost no step in vain."""
    pipeline = Pipeline(BLOCKS)
    for count in (5, 8):
        pipeline.add([1, 2, 3], greedy(count))
    while pipeline.step():
        pass
    assert (pipeline.num_ahead, pipeline.num_in_vain) == (6, 0)  # of eight: the prompts, then seven of decode


def test_a_request_that_may_be_let_in_goes_first() -> None:
    """No step is scheduled ahead while somebody waits and there is a place."""
    pipeline = Pipeline(BLOCKS)
    pipeline.add([1, 2], greedy(9))
    for _ in range(3):
        pipeline.step()
    assert pipeline.next is not None
    late = pipeline.add([4], greedy(2))
    pipeline.step()
    assert pipeline.next is None
    pipeline.step()
    assert late.scheduled_time is not None


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
