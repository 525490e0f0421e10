"""Whether the queue takes one more request: decided at once, before anything is done for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsrpc.errors import QueueFullError, WaitTooLongError
from hsrpc.request import SamplingParams
from hsrpc.schedule.scheduler import Scheduler

_HOPELESS = 2.0
"""A request is refused for its predicted wait if that is so many times longer than it may be: predictions are rough."""
_MAX_RETRY = 60.0


class Admission:
    """Bounds the requests, and the prompt tokens, that wait in `scheduler` or are being prepared for it."""

    def __init__(self, scheduler: Scheduler, max_requests: int, max_tokens: int) -> None:
        self._scheduler = scheduler
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._num_preparing = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While it is tokenised, a request holds the place that it will have in the queue; so does a mere text."""
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    def check(self, num_tokens: int, params: SamplingParams, client: str, max_wait: float | None) -> None:
        """Refuse a request of `num_tokens` (0: not known yet) that may wait `max_wait` s for its first token.

        Raises:
            QueueFullError: too many requests or tokens wait.
            WaitTooLongError: by the time it ran, it would long be over.
        """
        self.check_count()
        queued = self._scheduler.num_waiting_tokens
        if queued and queued + max(num_tokens, 1) > self._max_tokens:
            raise QueueFullError(f"{queued} prompt tokens wait already (max_queued_tokens)")
        self._check_wait(params, client, max_wait)

    def check_count(self) -> None:
        """Refuse one more of whatever length.

        Raises:
            QueueFullError: too many requests wait.
        """
        waiting = self._scheduler.num_waiting + self._num_preparing
        if waiting >= self._max_requests:
            raise QueueFullError(f"{waiting} requests wait already (max_queued_requests)")

    def _check_wait(self, params: SamplingParams, client: str, max_wait: float | None) -> None:
        limits = [limit for limit in (max_wait, params.time_limit) if limit is not None]
        if not limits or params.priority < 0:  # an urgent request passes others: how many, nobody knows
            return
        wait = self._scheduler.predicted_wait(client)
        if wait > _HOPELESS * min(limits):
            message = f"the predicted wait is {wait:.1f} s, and the request may wait {min(limits):.1f} s"
            raise WaitTooLongError(message, retry_after=min(_MAX_RETRY, max(1.0, wait - min(limits))))
