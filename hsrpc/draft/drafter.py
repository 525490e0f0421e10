"""What the engine asks of whatever proposes tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol


class Wanted(NamedTuple):
    """A request that may go on with drafted tokens."""

    request_id: str
    salt: str
    """Requests of equal salt alone may learn from each other."""
    token_ids: Sequence[int]
    """Prompt, then output; not copied, and must not change while a drafter looks."""
    num_prompt_tokens: int
    max_tokens: int
    """Tokens to draft, at most; at least 1."""


class Drafter(Protocol):
    """Tokens that requests may go on with. Called on a thread of its own, between steps; never by two at once."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        """One sequence for each of `wanted`, of at most its `max_tokens`; it may be empty."""
        ...

    def forget(self, request_ids: Collection[str]) -> None:
        """These requests have ended."""
        ...
