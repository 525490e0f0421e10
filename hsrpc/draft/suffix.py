"""Drafts by what followed most often: in the request itself, and in outputs of the requests before it.

The idea is SuffixDecoding's (arXiv 2411.04975): all places where the last tokens stood before are followed together,
and a draft is as long as they make likely that it is right. Places come from hash chains in place of a suffix tree
(`hsrpc.draft.trail`). A place at which more tokens are the same counts more, and so do several that agree.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hsrpc.draft.drafter import Wanted
from hsrpc.draft.trail import Trail

_SEPARATOR = -1
"""Stands between two outputs: no token, so nothing matches across it."""
_CONTEXT = 8
"""Last tokens of a prompt that are kept with an output: they tell where it begins."""
_DOUBT = 2.0
"""Tokens that are the same, at all places that agree, for which what they say is as likely wrong as right."""
_MORE = 2.0
"""Times that a place counts more for each token more that is the same there."""


class Place(NamedTuple):
    """A place that may be followed."""

    length: int
    """Tokens before it that are the same."""
    row: Sequence[int]
    """What followed."""


def follow(places: Sequence[Place], max_tokens: int, min_chance: float) -> list[int]:
    """Tokens that follow at most places, as long as the chance that all of them are right is at least `min_chance`."""
    draft, chance = list[int](), 1.0
    for depth in range(max_tokens):
        places = [place for place in places if len(place.row) > depth]
        if not places:
            break
        votes = dict[int, float]()
        for length, row in places:
            votes[row[depth]] = votes.get(row[depth], 0.0) + _MORE**length
        token = max(votes, key=votes.__getitem__)
        places = [place for place in places if place.row[depth] == token]
        same = sum(length for length, _ in places) + depth * len(places)
        chance *= votes[token] / sum(votes.values()) * same / (same + _DOUBT)
        if chance < min_chance:
            break
        draft.append(token)
    return draft


class Outputs:
    """Outputs of requests of one salt that have ended, as far back as `max_tokens` reach.

    Two halves: once the newer one is full it becomes the older one, and what that was is gone.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_half = max_tokens // 2
        self._newer, self._older = Trail(), Trail()

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def add(self, output: Sequence[int]) -> None:
        """Remember an output, or the end of one that is too long."""
        output = output[-(self._max_half - 1) :]
        if len(self._newer) + len(output) >= self._max_half:
            self._newer, self._older = Trail(), self._newer
        self._newer.extend([*output, _SEPARATOR])

    def places(self, tail: Sequence[int], max_tokens: int) -> Iterator[Place]:
        """What followed where `tail` stood, the newest first."""
        for trail in (self._newer, self._older):
            for length, end in trail.matches(tail):
                yield Place(length, _whole(trail.tokens[end : end + max_tokens]))


def _whole(row: array[int]) -> array[int]:
    """The row up to where its output ended."""
    return row[: row.index(_SEPARATOR)] if _SEPARATOR in row else row


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    salt: str
    num_prompt_tokens: int
    trail: Trail = field(default_factory=Trail)

    @property
    def output(self) -> Sequence[int]:
        """What it wrote, with the last tokens of its prompt before; nothing if it wrote nothing."""
        begin = self.num_prompt_tokens
        return self.trail.tokens[max(0, begin - _CONTEXT) :] if len(self.trail) > begin else ()

    def places(self, max_tokens: int) -> Iterator[Place]:
        """What followed in the request itself, the newest first."""
        for length, end in self.trail.matches(self.trail.tail):
            yield Place(length, self.trail.go_on(end, max_tokens))


class SuffixDrafter:
    """Follows the places where a request's last tokens stood, in itself and in outputs of its salt, by majority."""

    def __init__(self, *, min_chance: float = 0.1, max_of_salt: int = 1 << 18, max_kept: int = 1 << 21) -> None:
        self._min_chance = min_chance
        """A draft ends where the chance that all of it is right falls below this."""
        self._max_of_salt = max_of_salt
        """Tokens of ended requests that are kept for one salt."""
        self._max_kept = max_kept
        """The same for all; the salt whose requests ended longest ago goes first."""
        self._num_kept = 0
        self._live: dict[str, _Live] = {}
        self._outputs: dict[str, Outputs] = {}
        """By salt, the last that was added to at the end."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds: of requests that have not ended, and of outputs of those that have."""
        return sum(len(live.trail) for live in self._live.values()) + self._num_kept

    def draft(self, wanted: Sequence[Wanted]) -> list[Sequence[int]]:
        """One sequence for each; see `Drafter`."""
        return [self._draft(each) for each in wanted]

    def forget(self, request_ids: Collection[str]) -> None:
        """Free what is known of these requests; what they wrote is kept for others of their salt."""
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None and live.output:
                self._keep(live.salt, live.output)

    def _draft(self, wanted: Wanted) -> list[int]:
        request_id, salt, token_ids, num_prompt_tokens, max_tokens = wanted
        live = self._live.get(request_id)
        if live is None:
            live = self._live[request_id] = _Live(salt, num_prompt_tokens)
        live.trail.extend(token_ids[len(live.trail) :])
        places = list(live.places(max_tokens))
        if salt in self._outputs:
            places += self._outputs[salt].places(live.trail.tail, max_tokens)
        return follow(places, max_tokens, self._min_chance)

    def _keep(self, salt: str, output: Sequence[int]) -> None:
        """Remember an output, and as many salts as there is room for."""
        outputs = self._take(salt) or Outputs(self._max_of_salt)
        outputs.add(output)
        self._outputs[salt] = outputs
        self._num_kept += len(outputs)
        while self._num_kept > self._max_kept:
            self._take(next(iter(self._outputs)))

    def _take(self, salt: str) -> Outputs | None:
        """Remove what is kept of a salt."""
        outputs = self._outputs.pop(salt, None)
        self._num_kept -= len(outputs or ())
        return outputs
