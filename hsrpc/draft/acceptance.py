"""How likely a drafted token is right, learnt from what became of those before it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

_KEPT = 0.93
"""Part that what is known of a request still counts after one more token was tried."""
_KEPT_OF_ALL = 0.999
"""The same for what is known of all requests together."""
_PRIOR_TOKENS = 2.0
"""Tried tokens that what is known of all requests counts in the estimate of one."""
_FIRST_RIGHT, _FIRST_TRIED = 2.0, 4.0
"""As if so many had been tried before the first."""


class Acceptance(NamedTuple):
    """What may be expected of a request's drafts."""

    chance: float
    """A token is right if all before it in its draft are; 0 to 1."""
    num_idle: int
    """Steps since its drafter was last asked."""

    def expected_tokens(self, num_drafted: int) -> float:
        """Tokens of a step with so many drafted ones, that of the model's own included: tau."""
        return sum(self.chance**depth for depth in range(num_drafted + 1))


@dataclass(slots=True)
class _Count:
    """Tokens that were right, of those that were tried; older ones count less."""

    right: float = 0.0
    tried: float = 0.0
    num_idle: int = 0

    def add(self, right: int, tried: int, kept: float) -> None:
        before = kept**tried
        self.right = self.right * before + right
        self.tried = self.tried * before + tried


class AcceptanceEstimates:
    """Running estimates for the requests of one drafter. A new request is taken to be as those before it."""

    def __init__(self) -> None:
        self._all = _Count(_FIRST_RIGHT, _FIRST_TRIED)
        self._requests: dict[str, _Count] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def note(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """A step had so many drafted tokens of this request, of which the first so many were right.

        What is behind the first wrong one says nothing, and counts as not tried.
        """
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(f"num_accepted is {num_accepted}; it must be between 0 and num_drafted, {num_drafted}")
        count = self._requests.setdefault(request_id, _Count())
        count.num_idle = 0
        tried = min(num_drafted, num_accepted + 1)
        count.add(num_accepted, tried, _KEPT)
        self._all.add(num_accepted, tried, _KEPT_OF_ALL)

    def pass_over(self, request_id: str) -> None:
        """A step asked for no draft of this request."""
        self._requests.setdefault(request_id, _Count()).num_idle += 1

    def of(self, request_id: str) -> Acceptance:
        """The estimate for a request, of which nothing need be known."""
        count = self._requests.get(request_id, _Count())
        prior = self._all.right / self._all.tried
        chance = (count.right + _PRIOR_TOKENS * prior) / (count.tried + _PRIOR_TOKENS)
        return Acceptance(chance, count.num_idle)

    def forget(self, request_ids: Collection[str]) -> None:
        """Free what is known of these requests."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
