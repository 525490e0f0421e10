"""Whether the queue takes one more request: decided at once, before anything is done for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from hsrpc.errors import GaveWayError, HsrpcError, QueueFullError, WaitTooLongError
from hsrpc.request import SamplingParams
from hsrpc.schedule.queue_places import Shares, Waiter
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler

_HOPELESS = 2.0
"""A request is refused for its predicted wait if that is so many times longer than it may be: predictions are rough."""
_MAX_RETRY = 60.0


@dataclass(slots=True, eq=False)
class Applicant:
    """Who wants a request to wait. While the prompt is tokenised, it holds the place that the request will have."""

    params: SamplingParams
    client: str
    user: str
    max_wait: float | None
    """Seconds for the first token; None: for ever."""
    num_prompt_tokens: int
    """1 where the number is not known yet."""
    arrival_time: float = field(default_factory=time.monotonic)
    gave_way: bool = False
    """Its place is another's: it is to be refused."""


class _Shortage(NamedTuple):
    """What there is too little of for one more request."""

    shares: Shares
    amount: int
    """That the request takes of it."""
    message: str


class Admission:
    """Bounds the requests, and the prompt tokens, that wait in `scheduler` or are being prepared for it.

    Beyond a bound, the longest client's line gives way to one that stays shorter with the new request: `fail` ends a
    request that waits already.
    """

    def __init__(
        self, scheduler: Scheduler, fail: Callable[[Request, HsrpcError], object], max_requests: int, max_tokens: int
    ) -> None:
        self._scheduler = scheduler
        self._places = scheduler.places
        self._fail = fail
        self._max_requests = max_requests
        self._max_tokens = max_tokens

    @contextmanager
    def preparing(self, applicant: Applicant) -> Iterator[None]:
        """While it is tokenised, `applicant` holds the place that its request will have in the queue.

        Raises:
            GaveWayError: at the block's end, where it had to give its place up.
        """
        self._places.hold(applicant)
        try:
            yield
        finally:
            self._places.release(applicant)
        if applicant.gave_way:
            raise _gave_way()

    @contextmanager
    def admitting_text(self, client: str) -> Iterator[None]:
        """A text that becomes no request holds a place as one would, but no tokens, while the block runs.

        Raises:
            QueueFullError, GaveWayError: as `check` and `preparing`.
        """
        text = Applicant(SamplingParams(), client, "", None, 0)
        self.check(text)
        with self.preparing(text):
            yield

    def check(self, applicant: Applicant) -> None:
        """Refuse `applicant`, which holds no place, or see to it that there is room for its request.

        Raises:
            QueueFullError: too many requests or tokens wait, and no other line is longer.
            WaitTooLongError: by the time it ran, it would long be over.
        """
        shortage = self._shortage(applicant)
        if shortage is None:
            self._check_wait(applicant)
            return
        giving_way = self._choose(applicant, shortage)
        self._check_wait(applicant)
        for waiter in giving_way:
            self._end(waiter)

    def _choose(self, applicant: Applicant, shortage: _Shortage) -> list[Waiter]:
        """Those that give way to `applicant`."""
        chosen: list[Waiter] = []
        left: _Shortage | None = shortage
        try:
            while left is not None:
                waiter = self._places.giving_way(left.shares, applicant.client, applicant.user, left.amount)
                if waiter is None:
                    unmet = shortage if left.shares is shortage.shares else left
                    raise QueueFullError(unmet.message)
                self._places.release(waiter)
                chosen.append(waiter)
                left = self._shortage(applicant)
        finally:
            for waiter in reversed(chosen):  # the last of its line again
                self._places.hold(waiter)
        return chosen

    def _shortage(self, applicant: Applicant) -> _Shortage | None:
        requests, tokens = self._places.requests, self._places.tokens
        waiting = requests.total + self._scheduler.num_preempted
        if waiting >= self._max_requests:
            return _Shortage(requests, 1, f"{waiting} requests wait already (max_queued_requests)")
        queued = tokens.total + self._scheduler.num_preempted_tokens
        if queued and queued + applicant.num_prompt_tokens > self._max_tokens:
            message = f"{queued} prompt tokens wait already (max_queued_tokens)"
            return _Shortage(tokens, applicant.num_prompt_tokens, message)
        return None

    def _end(self, waiter: Waiter) -> None:
        self._places.release(waiter)
        if isinstance(waiter, Applicant):
            waiter.gave_way = True
        elif isinstance(waiter, Request):
            self._fail(waiter, _gave_way())

    def _check_wait(self, applicant: Applicant) -> None:
        params = applicant.params
        limits = [limit for limit in (applicant.max_wait, params.time_limit) if limit is not None]
        if not limits or params.priority < 0:  # an urgent request passes others: how many, nobody knows
            return
        wait = self._scheduler.predicted_wait(applicant.client, applicant.user)
        if wait > _HOPELESS * min(limits):
            message = f"the predicted wait is {wait:.1f} s, and the request may wait {min(limits):.1f} s"
            raise WaitTooLongError(message, retry_after=min(_MAX_RETRY, max(1.0, wait - min(limits))))


def _gave_way() -> GaveWayError:
    return GaveWayError("the queue is full, and the request gave way to another client's")
