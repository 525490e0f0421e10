"""Tokens in order, and where those that stand last stood before: hash chains over pairs of tokens, as deflate has them.

A suffix tree finds the longest match exactly, but in Python it takes a dictionary for each node: hundreds of bytes a
token. Here a token takes 12 to 16 bytes, adding one takes constant time, and looking back takes as many places as are
tried, the newest first. What a hash confuses costs one of these places: the tokens themselves decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_MATCH = 2
"""Tokens that have to be the same before a place says anything of what comes next."""
MAX_MATCH = 32
"""Tokens that are compared: more of them prefer nothing."""
_MAX_TRIED = 16
"""Places that are looked at."""
_FACTOR = 40503
"""Spreads the older token over the buckets."""
_MANY = 64
"""Tokens from which arrays are faster than a loop."""
_NONE = 0
_TOKENS = "i"


class Match(NamedTuple):
    """A place at which the last tokens stood before."""

    length: int
    """How many of the last tokens are the same, at least `MIN_MATCH` and at most `MAX_MATCH`."""
    end: int
    """Where they end: the token of this number is what followed."""


class Trail:
    """Tokens in order, and where any two neighbours stood before.

    A place is an end: the number of tokens up to there.
    """

    def __init__(self) -> None:
        self.tokens = array(_TOKENS)
        self._newest = array(_TOKENS, [_NONE]) * _MANY
        """By bucket: the end of the newest pair; the number of buckets is a power of 2, and at least that of tokens."""
        self._earlier = array(_TOKENS, [_NONE]) * MIN_MATCH
        """By end: that of the newest pair before it in the same bucket."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tail(self) -> array[int]:
        """The last tokens, as many as are compared."""
        return self.tokens[-MAX_MATCH:]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens behind the others, in constant time for each."""
        begin = max(MIN_MATCH, len(self.tokens) + 1)
        self.tokens.extend(token_ids)
        if len(self.tokens) > len(self._newest):
            self._newest = array(_TOKENS, [_NONE]) * (1 << (2 * len(self.tokens)).bit_length())
            del self._earlier[MIN_MATCH:]
            begin = MIN_MATCH
        if len(self.tokens) - begin < _MANY:
            self._link(begin)
        else:
            self._link_many(begin)

    def matches(self, tail: Sequence[int]) -> list[Match]:
        """Where a text that ends with `tail` stood before, the newest place first; none of them ends the trail."""
        tokens, found = self.tokens, list[Match]()
        if len(tail) < MIN_MATCH:
            return found
        before, last = tail[-2:]
        end = self._newest[self._bucket(before, last)]
        for _ in range(_MAX_TRIED):
            if end == _NONE:
                break
            if tokens[end - 1] == last and tokens[end - 2] == before and end < len(tokens):
                found.append(Match(self._common(tail, end), end))
            end = self._earlier[end]
        return found

    def go_on(self, end: int, max_tokens: int) -> array[int]:
        """The tokens from `end` on, and over again from there if the trail ends before there are `max_tokens`."""
        row = self.tokens[end : end + max_tokens]
        return row if len(row) == max_tokens else (row * -(-max_tokens // len(row)))[:max_tokens]

    def _common(self, tail: Sequence[int], end: int) -> int:
        """Tokens before `end` that are those at the end of `tail`; the first two are known to be."""
        tokens, length = self.tokens, MIN_MATCH
        longest = min(len(tail), end)
        while length < longest and tokens[end - length - 1] == tail[-length - 1]:
            length += 1
        return length

    def _bucket(self, before: int, last: int) -> int:
        return (before * _FACTOR + last) & (len(self._newest) - 1)

    def _link(self, begin: int) -> None:
        """Put pairs that end at `begin` and behind it into their buckets."""
        tokens, newest, earlier, mask = self.tokens, self._newest, self._earlier, len(self._newest) - 1
        for end in range(begin, len(tokens) + 1):
            bucket = (tokens[end - 2] * _FACTOR + tokens[end - 1]) & mask
            earlier.append(newest[bucket])
            newest[bucket] = end

    def _link_many(self, begin: int) -> None:
        """As `_link`, all at once."""
        tokens, newest = np.frombuffer(self.tokens, np.int32), np.frombuffer(self._newest, np.int32)
        ends = np.arange(begin, len(tokens) + 1, dtype=np.int32)
        pairs = tokens[begin - 2 : -1].astype(np.int64) * _FACTOR + tokens[begin - 1 :]
        buckets = pairs & (len(newest) - 1)
        order = np.argsort(buckets, kind="stable")
        buckets, ends = buckets[order], ends[order]
        earlier = np.empty_like(ends)
        earlier[order] = np.where(np.diff(buckets, prepend=-1) == 0, np.roll(ends, 1), newest[buckets])
        self._earlier.frombytes(earlier.tobytes())
        newest[buckets] = ends  # of equal buckets the last one, which is the newest, stays
