"""What requests draft in a step, and what verifying it takes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hsrpc.draft.allocation import StepPrice


class Drafting(NamedTuple):
    """What each request drafts in a step."""

    tokens: int = 0
    acceptance: float = 0.0
    """Part of them that is accepted, of those before which all were."""


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
