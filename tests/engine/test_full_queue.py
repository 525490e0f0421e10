"""Who is taken when the queue is full: the rules of `Admission` on random sequences, with a scheduler and no engine."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.engine.admission import Admission, Applicant
from hsrpc.errors import GaveWayError, HsrpcError, QueueFullError
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler
from tests.schedule.test_scheduler import make

MAX_REQUESTS, MAX_TOKENS = 5, 40


class FullQueue:
    """Calls that are prepared and then wait, with how each ended."""

    def __init__(self) -> None:
        self.scheduler: Scheduler = make(max_batch=1).scheduler
        self.admission = Admission(self.scheduler, self._fail, MAX_REQUESTS, MAX_TOKENS)
        self.preparing: dict[Applicant, AbstractContextManager[None]] = {}
        self.waiting: list[Request] = []
        self.ends: Counter[object] = Counter()
        self.calls = 0
        self.numbers = count()

    def _fail(self, request: Request, error: HsrpcError) -> None:
        assert isinstance(error, GaveWayError)
        assert request.scheduled_time is None
        assert not request.num_output_tokens
        self._end(request)

    def _end(self, request: Request) -> None:
        self.waiting.remove(request)
        self.ends[request] += 1
        self.scheduler.finish(request.request_id, FinishReason.ABORTED)

    def call(self, client: str, user: str, num_tokens: int, priority: int) -> None:
        """One more is prepared, or refused with good reason."""
        applicant = Applicant(SamplingParams(priority=priority), client, user, None, num_tokens)
        self.calls += 1
        if self.is_taken(applicant):
            self.preparing[applicant] = self.admission.preparing(applicant)
            self.preparing[applicant].__enter__()

    def prepared(self, applicant: Applicant, num_tokens: int) -> None:
        """Its prompt has `num_tokens`: it waits now, or is refused with good reason."""
        try:
            self.preparing.pop(applicant).__exit__(None, None, None)
        except GaveWayError:
            self.ends[applicant] += 1
            return
        applicant.num_prompt_tokens = num_tokens
        if self.is_taken(applicant):
            number = next(self.numbers)
            params, now = applicant.params, applicant.arrival_time
            names = {"client": applicant.client, "user": applicant.user}
            request = Request(str(number), [1] * num_tokens, params, number, now, **names)
            self.waiting.append(request)
            self.scheduler.add(request)

    def is_taken(self, applicant: Applicant) -> bool:
        before, ended = self.lines(), self.ends.total() + sum(one.gave_way for one in self.preparing)
        try:
            self.admission.check(applicant)
        except QueueFullError as error:
            assert ended == self.ends.total() + sum(one.gave_way for one in self.preparing)  # nobody gave way in vain
            if "requests" in str(error):
                self.check_refusal(before, applicant.client)
            self.ends[applicant] += 1
            return False
        return True

    def check_refusal(self, lines: Counter[str], client: str) -> None:
        """No client with at most its share is refused while another has more than one above it."""
        clients = len({*lines, client})
        if lines[client] <= MAX_REQUESTS // clients:
            assert all(length <= lines[client] + 1 for length in lines.values())

    def lines(self) -> Counter[str]:
        return Counter(one.client for one in (*self.preparing, *self.waiting) if not getattr(one, "gave_way", False))

    def check(self) -> None:
        preparing = [one for one in self.preparing if not one.gave_way]
        held = [*preparing, *self.waiting]
        assert self.scheduler.places.requests.total == len(held) <= MAX_REQUESTS
        tokens = [one.num_prompt_tokens for one in held]
        assert self.scheduler.places.tokens.total == sum(tokens)
        assert len(tokens) <= 1 or sum(tokens) <= MAX_TOKENS
        assert {one.request_id for one in self.scheduler.live()} == {one.request_id for one in self.waiting}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("call"),
            st.sampled_from("aaaabc"),
            st.sampled_from("xxy"),
            st.sampled_from((1, 1, 1, 1, 1, 1, 1, 1, 20, 50)),
            st.integers(-1, 1),
        ),
        st.tuples(st.just("prepared"), st.integers(0, 99), st.sampled_from((1, 1, 1, 1, 1, 1, 2, 50))),
        st.tuples(st.just("leave"), st.integers(0, 99)),
    ),
    min_size=10,
    max_size=100,
)


@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_any_sequence_keeps_bounds_and_shares(operations: list[tuple]):
    """The bounds hold, no client below its share is refused for a longer line, and each call ends exactly once."""
    queue = FullQueue()
    for name, *values in operations:
        if name == "call":
            queue.call(*values)
        elif name == "prepared" and queue.preparing:
            queue.prepared(list(queue.preparing)[values[0] % len(queue.preparing)], values[1])
        elif name == "leave" and queue.waiting:
            queue._end(queue.waiting[values[0] % len(queue.waiting)])
        queue.check()
    for applicant in list(queue.preparing):
        queue.prepared(applicant, 1)
    for request in list(queue.waiting):
        queue._end(request)
    assert set(queue.ends.values()) <= {1}
    assert queue.ends.total() == queue.calls
    assert queue.scheduler.places.requests.total == queue.scheduler.places.tokens.total == 0
