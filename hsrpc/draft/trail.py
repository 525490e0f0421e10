"""Tokens in order, and where those that stand last stood before: hash chains over pairs of tokens, as deflate has them.

A suffix tree finds the longest match exactly, but in Python it takes a dictionary for each node: hundreds of bytes a
token. Here a token takes 12 to 16 bytes, adding one takes constant time, and looking back takes as many places as are
tried, the newest first. What a hash confuses costs one of these places: the tokens themselves decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

MIN_MATCH = 2
"""Tokens that have to be the same before a place says anything of what comes next."""
MAX_MATCH = 16
"""Tokens that are compared: where so many are the same, what comes next is right 19 times of 20."""
_MAX_TRIED = 8
"""Places that are looked at: all of them are no better, not even of 60,000 tokens."""
_FACTOR = 40503
"""Spreads the older token over the buckets."""
_MANY = 64
"""Tokens from which arrays are faster than a loop."""
_NONE = 0
_TOKENS = "i"
_TOKEN_BITS = 32


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
        self._followed = _NONE
        """A place before which `MAX_MATCH` tokens are those that end the trail, while it goes on as it did there."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tail(self) -> array[int]:
        """The last tokens, as many as are compared."""
        return self.tokens[-MAX_MATCH:]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens behind the others, in constant time for each."""
        tokens, known, followed = self.tokens, len(self.tokens), self._followed
        tokens.extend(token_ids)
        is_as_before = followed != _NONE and tokens[followed : followed + len(token_ids)] == tokens[known:]
        self._followed = followed + len(token_ids) if is_as_before else _NONE
        begin = max(MIN_MATCH, known + 1)
        if len(tokens) > len(self._newest):
            self._newest = array(_TOKENS, [_NONE]) * (1 << len(tokens).bit_length())
            del self._earlier[MIN_MATCH:]
            begin = MIN_MATCH
        if len(tokens) - begin < _MANY:
            self._link(begin)
        else:
            self._link_many(begin)

    def repeats(self) -> list[tuple[int, int]]:
        """Where what ends the trail stood before, as `matches` tells it.

        As long as it goes on as after `MAX_MATCH` equal tokens, that place is the only one.
        """
        if self._followed != _NONE:
            return [(MAX_MATCH, self._followed)]
        found = self.matches(self.tail)
        if found and found[-1][0] == MAX_MATCH:
            self._followed = found[-1][1]
        return found

    def matches(self, tail: array[int]) -> list[tuple[int, int]]:
        """Where a text that ends with `tail` stood before, the newest place first; none of them ends the trail.

        For each how many of the last tokens are the same, at least `MIN_MATCH` and at most `MAX_MATCH`, and where they
        end: the token of this number is what followed. The first of `MAX_MATCH` is the last one told.
        """
        tokens, earlier, found = self.tokens, self._earlier, list[tuple[int, int]]()
        if len(tail) < MIN_MATCH:
            return found
        before, last = tail[-2], tail[-1]
        number = int.from_bytes(tail, "little")
        end = self._newest[(before * _FACTOR + last) & (len(self._newest) - 1)]
        for _ in range(_MAX_TRIED):
            if end == _NONE:
                break
            if tokens[end - 1] == last and tokens[end - 2] == before and end < len(tokens):
                same = self._common(number, len(tail), end)
                found.append((same, end))
                if same == MAX_MATCH:
                    break
            end = earlier[end]
        return found

    def go_on(self, end: int, max_tokens: int) -> array[int]:
        """The tokens from `end` on, and over again from there if the trail ends before there are `max_tokens`."""
        row = self.tokens[end : end + max_tokens]
        return row if len(row) == max_tokens else (row * -(-max_tokens // len(row)))[:max_tokens]

    def _common(self, tail: int, length: int, end: int) -> int:
        """Tokens before `end` that are the last ones of a tail of so many tokens, which comes as one number.

        The newest token is in the highest bits, so the highest bit that differs tells the first token that does.
        """
        same = self.tokens[max(0, end - length) : end]
        missing = length - len(same)
        other = int.from_bytes(same, "little") << (missing * _TOKEN_BITS)
        differing = -(-(tail ^ other).bit_length() // _TOKEN_BITS)
        return length - max(differing, missing)

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
