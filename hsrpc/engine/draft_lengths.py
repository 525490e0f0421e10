"""How many tokens are drafted for each request of the next step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

from hsrpc.draft.acceptance import AcceptanceEstimates
from hsrpc.draft.allocation import Draftable, StepPrice, allocate
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import DraftCandidate


class DraftLengths(Protocol):
    """Decides how many tokens are drafted for each request."""

    def choose(self, candidates: Sequence[DraftCandidate]) -> Sequence[int]:
        """For each candidate of the next step, GPU by GPU, of at most its `max_tokens`; 0: none."""
        ...

    def forget(self, request_ids: Collection[str]) -> None:
        """These have ended."""
        ...


class AllThatFit:
    """As many tokens as there is room for, whatever becomes of them."""

    def choose(self, candidates: Sequence[DraftCandidate]) -> Sequence[int]:
        return [candidate.max_tokens for candidate in candidates]

    def forget(self, request_ids: Collection[str]) -> None:
        """Nothing is known of them."""


class ByGain:
    """As many tokens as raise tokens/s, by what became of those drafted before."""

    def __init__(self, price: StepPrice) -> None:
        """`price`: what drafted rows cost a step of a GPU's planned batch."""
        self._price = price
        self._estimates = AcceptanceEstimates()
        self._asked: dict[str, _Counts] = {}
        """What requests had when their drafter was last asked, and that is not known yet what became of it."""

    def choose(self, candidates: Sequence[DraftCandidate]) -> Sequence[int]:
        for candidate in candidates:
            self._learn(candidate.request)
        of_gpus = groupby(candidates, key=lambda candidate: candidate.request.gpu)
        counts = [count for _, of_gpu in of_gpus for count in allocate(list(map(self._draftable, of_gpu)), self._price)]
        for candidate, count in zip(candidates, counts, strict=True):
            request = candidate.request
            if count:
                self._asked[request.request_id] = _Counts.of(request)
            else:
                self._estimates.pass_over(request.request_id)
        return counts

    def forget(self, request_ids: Collection[str]) -> None:
        self._estimates.forget(request_ids)
        for request_id in request_ids:
            self._asked.pop(request_id, None)

    def _draftable(self, candidate: DraftCandidate) -> Draftable:
        return Draftable(self._estimates.of(candidate.request.request_id), candidate.max_tokens)

    def _learn(self, request: Request) -> None:
        before = self._asked.pop(request.request_id, None)
        if before is not None:
            now = _Counts.of(request)
            self._estimates.note(request.request_id, now.drafted - before.drafted, now.accepted - before.accepted)


class _Counts(NamedTuple):
    """Tokens of a request."""

    drafted: int
    accepted: int

    @classmethod
    def of(cls, request: Request) -> _Counts:
        return cls(request.num_drafted, request.num_accepted)
