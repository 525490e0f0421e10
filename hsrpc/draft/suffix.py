"""Drafts by what followed most often: in the request itself, and in outputs of the requests before it.

The idea is SuffixDecoding's (arXiv 2411.04975): all places where the last tokens stood before are followed together,
and a draft is as long as they make likely that it is right. Places come from hash chains in place of a suffix tree
(`hsrpc.draft.trail`). A place at which more tokens are the same counts more, and so do several that agree.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hsrpc.draft.drafter import Wanted
from hsrpc.draft.trail import MAX_MATCH, Trail

_SEPARATOR = -1
"""Stands between two outputs: no token, so nothing matches across it."""
_CONTEXT = 8
"""Last tokens of a prompt that are kept with an output: they tell where it begins."""
_DOUBT = 2.0
"""Tokens that are the same, at all places that agree, for which what they say is as likely wrong as right."""
_MORE = 2.0
"""Times that a place counts more for each token more that is the same there."""
_MUCH_LESS = 4
"""Places at which so many fewer tokens are the same than at another still count; others would have no weight."""


class _Voice(NamedTuple):
    """Places that all go on in the same way."""

    row: array[int]
    """What followed."""
    weight: float
    num_places: int
    same: int
    """Tokens before them that are the same, of all places together."""

    def rest(self, begin: int, chance: float, min_chance: float) -> array[int]:
        """What followed from `begin` on, as long as the chance that it is right is at least `min_chance`."""
        row, _, num_places, same = self
        same += begin * num_places
        for depth in range(begin, len(row)):
            chance *= same / (same + _DOUBT)
            if chance < min_chance:
                return row[begin:depth]
            same += num_places
        return row[begin:]


_SILENT = _Voice(array("i"), 0.0, 0, 0)


class Votes:
    """Places that may be followed, those that go on in the same way together."""

    def __init__(self) -> None:
        self._voices: dict[bytes, _Voice] = {}

    def add(self, row: array[int], length: int) -> None:
        """Count a place before which `length` tokens are the same, and which goes on with `row`."""
        key = row.tobytes()
        _, weight, num_places, same = self._voices.get(key, _SILENT)
        self._voices[key] = _Voice(row, weight + _MORE**length, num_places + 1, same + length)

    def follow(self, min_chance: float) -> list[int]:
        """Tokens that most places go on with, as long as the chance that all are right is at least `min_chance`."""
        voices, draft, chance = list(self._voices.values()), list[int](), 1.0
        while voices := [voice for voice in voices if len(voice.row) > len(draft)]:
            if len(voices) == 1:
                draft += voices[0].rest(len(draft), chance, min_chance)
                break
            depth = len(draft)
            weights = dict[int, float]()
            for voice in voices:
                token = voice.row[depth]
                weights[token] = weights.get(token, 0.0) + voice.weight
            token = max(weights, key=weights.__getitem__)
            voices = [voice for voice in voices if voice.row[depth] == token]
            same = sum(voice.same + depth * voice.num_places for voice in voices)
            chance *= weights[token] / sum(weights.values()) * same / (same + _DOUBT)
            if chance < min_chance:
                break
            draft.append(token)
        return draft


def votes_of(own: Trail, others: Iterable[Trail], max_tokens: int) -> Votes:
    """What followed where what ends `own` stood before, in itself and in others.

    Once `MAX_MATCH` tokens are the same at some place, no more are asked.
    """
    found = list[tuple[int, int, Trail]]()
    for trail in (own, *others):
        found += [(same, end, trail) for same, end in (trail.repeats() if trail is own else trail.matches(own.tail))]
        if found and found[-1][0] == MAX_MATCH:
            break
    votes, longest = Votes(), max((same for same, _, _ in found), default=0)
    for same, end, trail in found:
        if same >= longest - _MUCH_LESS:
            votes.add(_whole(trail.go_on(end, max_tokens)), same)
    return votes


def _whole(row: array[int]) -> array[int]:
    """The row up to where its output ended."""
    return row[: row.index(_SEPARATOR)] if _SEPARATOR in row else row


class Outputs:
    """Outputs of requests of one salt that have ended, as far back as `max_tokens` reach.

    Two halves: once the newer one is full it becomes the older one, and what that was is gone.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_half = max_tokens // 2
        self._newer, self._older = Trail(), Trail()

    def __len__(self) -> int:
        return sum(map(len, self.trails))

    @property
    def trails(self) -> tuple[Trail, Trail]:
        """Both halves, the newer one first; each ends with a separator."""
        return self._newer, self._older

    def add(self, output: Sequence[int]) -> None:
        """Remember an output, or the end of one that is too long."""
        output = output[-(self._max_half - 1) :]
        if len(self._newer) + len(output) >= self._max_half:
            self._newer, self._older = Trail(), self._newer
        self._newer.extend([*output, _SEPARATOR])


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
        request_id, salt, token_ids, num_prompt_tokens, max_tokens, _ = wanted
        live = self._live.get(request_id)
        if live is None:
            live = self._live[request_id] = _Live(salt, num_prompt_tokens)
        live.trail.extend(token_ids[len(live.trail) :])
        outputs = self._outputs.get(salt)
        others = outputs.trails if outputs is not None else ()
        return votes_of(live.trail, others, max_tokens).follow(self._min_chance)

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
