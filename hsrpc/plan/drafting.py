"""What requests draft in a step, and what verifying it takes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hsrpc.draft.allocation import StepPrice
from hsrpc.plan.sizes import Number


class DraftTime(NamedTuple):
    """Seconds that a draft model takes between two steps, in which the device does nothing else.

    One pass computes what it has not seen of each request, and gives the first token; each token more takes another.
    """

    first: float = 0.0
    """Seconds for the host to lay out and launch the first pass, which no graph runs."""
    each: float = 0.0
    """Seconds that a pass takes the device, whatever the requests: it reads the draft model's weights."""
    request: float = 0.0
    """Seconds more for each request."""

    def token(self, batch: Number) -> Number:
        """A token more for each of `batch` requests."""
        return self.each + batch * self.request

    def seconds(self, batch: Number, drafts: Number) -> Number:
        """So many drafted tokens for each of `batch` requests."""
        found: Number = np.where(np.asarray(drafts) > 0, self.first + drafts * self.token(batch), 0.0)
        return found


NO_DRAFT_TIME = DraftTime()
"""What drafts is no model, or nothing does."""


class Drafting(NamedTuple):
    """What each request drafts in a step."""

    tokens: int = 0
    acceptance: float = 0.0
    """Part of them that is accepted, of those before which all were."""
    time: DraftTime = NO_DRAFT_TIME
    """What proposing them takes."""


NOTHING_DRAFTED = Drafting()


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """Room for drafts, and what they cost."""

    drafting: Drafting = NOTHING_DRAFTED
    """The most that a request drafts, and what is expected of it."""
    price: StepPrice | None = None
    """What drafted rows cost a step of the planned batch; None: there are none."""
    reason: str = ""
    """Why so many, for people; empty where none are wanted."""


NO_DRAFTS = DraftPlan()
