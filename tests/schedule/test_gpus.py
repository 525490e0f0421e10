"""Several GPUs: each request is on one of them, and gets what it would get alone; all have one queue and one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits
from hsrpc.schedule.step import Scheduled
from tests.schedule.test_scheduler import EOS, LIMITS, generate, next_token

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
SHARING = replace(LIMITS, shares_prefixes=True)


class Gpus:
    """A scheduler of several GPUs, and checks after each step."""

    def __init__(self, count: int, num_blocks: int, limits: SchedulerLimits = SHARING) -> None:
        first, *others = [BlockManager({PoolId.HOST_KV: num_blocks}, limits.max_batch) for _ in range(count)]
        self.scheduler = Scheduler(first, limits, [EOS], others)
        self.limits = limits
        self.requests: list[Request] = []

    def add(self, prompt: Sequence[int], params: SamplingParams = PARAMS) -> Request:
        number = len(self.requests)
        self.requests.append(Request(str(number), list(prompt), params, number, 0.0))
        self.scheduler.add(self.requests[-1])
        return self.requests[-1]

    def step(self) -> Scheduled | None:
        """Compute a step."""
        before = {request.arrival: request.gpu for request in self.scheduler.running}
        step = self.scheduler.schedule(0.0)
        self.check(before)
        if step is None:
            return None
        self.check_parts(step)
        sampling = (chunk.request for chunk in step.chunks if chunk.samples)
        self.scheduler.commit(step.step_id, [next_token(request.token_ids) for request in sampling], 1.0)
        return step

    def check(self, before: dict[int, int]) -> None:
        """Nobody moves while it runs; each GPU has its bounds; blocks are held where their requests are."""
        running = self.scheduler.running
        assert all(
            before.get(request.arrival, request.gpu) == request.gpu or request.preemptions for request in running
        )
        for gpu in range(len(self.scheduler.blocks)):
            assert sum(request.gpu == gpu for request in running) <= self.limits.max_batch
        assert not any(name.startswith("blocks") for name in self.scheduler.integrity())

    def check_parts(self, step: Scheduled) -> None:
        """All of a mini-batch is of one GPU, and those of a GPU are neighbours, so that results can be joined."""
        of_batches = [{chunk.request.gpu for chunk in batch} for batch in step.mini_batches]
        assert all(len(gpus) == 1 for gpus in of_batches)
        order = [gpu for gpu, _ in groupby(min(gpus) for gpus in of_batches)]
        assert order == sorted(set(order))
        parts = [step.of_gpu(gpu) for gpu in range(len(self.scheduler.blocks))]
        assert tuple(batch for part in parts for batch in part.mini_batches) == step.mini_batches


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=20)


@given(
    count=st.integers(1, 3),
    num_blocks=st.integers(9, 16),
    requests=st.lists(st.tuples(prompts, st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=10),
    aborted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_request_gets_what_it_would_get_alone(
    count: int, num_blocks: int, requests: list[tuple[list[int], int, int]], aborted: list[tuple[int, int]]
) -> None:
    """They come at any time, are aborted, give way, and share what they begin with."""
    gpus, waiting, ended = Gpus(count, num_blocks), sorted(requests, key=lambda each: each[2]), set[int]()
    for tick in range(500):
        while waiting and waiting[0][2] <= tick:
            prompt, max_tokens, _ = waiting.pop(0)
            gpus.add(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        for number, when in aborted:
            if when == tick and number < len(gpus.requests) and gpus.requests[number].finish_reason is None:
                gpus.scheduler.finish(str(number), FinishReason.ABORTED)
                ended.add(number)
        if gpus.step() is None and not waiting:
            break
    assert gpus.scheduler.integrity() == {}
    for request in gpus.requests:
        if request.arrival not in ended:
            prompt = request.token_ids[: request.num_prompt_tokens]
            assert request.token_ids == generate(prompt, request.params, LIMITS.max_model_len)[0]


def test_requests_are_spread_over_the_gpus() -> None:
    """As evenly as they come, whatever they have in common."""
    gpus = Gpus(2, 40)
    for _ in range(2 * LIMITS.max_batch):
        gpus.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    while gpus.scheduler.num_waiting:
        gpus.step()
    assert [sum(r.gpu == gpu for r in gpus.scheduler.running) for gpu in range(2)] == [LIMITS.max_batch] * 2


def test_a_request_goes_where_its_first_blocks_are() -> None:
    """Also when nobody holds them any longer; one with others goes where there is more room."""
    gpus = Gpus(2, 40)
    first, second = gpus.add(range(3, 12)), gpus.add(range(4, 13))
    while gpus.step() is not None:
        pass
    assert {first.gpu, second.gpu} == {0, 1}
    for like in (second, first, second):
        again = gpus.add(like.token_ids[:9])
        while gpus.step() is not None:
            pass
        assert (again.gpu, again.cached_tokens) == (like.gpu, 8)


def test_a_request_goes_where_the_step_is_shorter() -> None:
    """By the tokens of those that run, not by how many these are; what a step has anyway adds nothing to it."""
    gpus = Gpus(2, 40)
    long = gpus.add([1] * 20)
    short = [gpus.add([number]) for number in range(2, 4)]
    for _ in range(3):  # until its prompt is computed
        gpus.step()
    assert [request.gpu for request in short] == [1 - long.gpu] * 2
    other, same = gpus.add([5, 6, 7]), gpus.add([1] * 20)
    gpus.step()
    assert (other.gpu, same.gpu) == (1 - long.gpu, long.gpu)


def test_requests_that_keep_no_cache_are_spread_over_the_gpus() -> None:
    """By their tokens too, though these are in no block."""
    gpus = Gpus(2, 40, replace(LIMITS, keeps_cache=False))
    long, *others = [gpus.add([1] * count) for count in (20, 4, 4)]
    gpus.step()
    assert [request.gpu for request in others] == [1 - long.gpu] * 2
