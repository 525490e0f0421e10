"""What the engine asks of whatever proposes tokens.

A drafter sees tokens alone: n-grams, suffixes and a draft model need no more. Heads on the model itself (EAGLE-3) read
what its layers computed of the newest tokens. For them the forward pass would keep the hidden states of a few layers
for the rows that are sampled, as it keeps those of the last layer for the logits, and hand them on with the commit: a
field of `Wanted` with the states of the accepted rows, on the device. The heads would be a model as the draft model is,
whose first layer takes these states beside the embeddings, with the same blocks, the same plan and the same call.
"""

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
    gpu: int = 0
    """The GPU that computes it, where there are several; it may come to another after it was preempted."""


class Drafter(Protocol):
    """Tokens that requests may go on with. Called on a thread of its own, between steps; never by two at once."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        """One sequence for each of `wanted`, of at most its `max_tokens`; it may be empty."""
        ...

    def forget(self, request_ids: Collection[str]) -> None:
        """These requests have ended."""
        ...
