"""Drafts from the request itself: what followed when its last tokens stood in its prompt or output before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hsrpc.draft.drafter import Wanted
from hsrpc.draft.trail import MIN_MATCH, Trail


class NgramDrafter:
    """Goes on as the request did where the most of its last tokens stood before; of equal places at the newest."""

    def __init__(self, min_match: int = MIN_MATCH) -> None:
        self._min_match = min_match
        """Tokens that have to be the same, at least."""
        self._trails: dict[str, Trail] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return sum(map(len, self._trails.values()))

    def draft(self, wanted: Sequence[Wanted]) -> list[Sequence[int]]:
        """One sequence for each; see `Drafter`."""
        return [self._draft(each) for each in wanted]

    def forget(self, request_ids: Collection[str]) -> None:
        """Free what is known of these requests."""
        for request_id in request_ids:
            self._trails.pop(request_id, None)

    def _draft(self, wanted: Wanted) -> Sequence[int]:
        trail = self._trails.get(wanted.request_id)
        if trail is None:
            trail = self._trails[wanted.request_id] = Trail()
        trail.extend(wanted.token_ids[len(trail) :])
        length, end = max(trail.repeats(), default=(0, 0))
        return trail.go_on(end, wanted.max_tokens) if length >= self._min_match else ()
