"""Hash chains beside a search through all tokens."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.draft.trail import MAX_MATCH, MIN_MATCH, Match, Trail

few_tokens = st.lists(st.integers(0, 3), max_size=60)
"""So few different ones that they often stand together again."""
LARGEST = 2**31 - 1
any_tokens = st.lists(st.integers(0, LARGEST), max_size=300)


def searched(tokens: list[int], tail: list[int]) -> list[Match]:
    """All places, the newest first."""
    found = []
    for end in range(len(tokens) - 1, 0, -1):
        same = 0
        while same < min(end, len(tail), MAX_MATCH) and tokens[end - same - 1] == tail[-same - 1]:
            same += 1
        if same >= MIN_MATCH:
            found.append(Match(same, end))
    return found


def trail_of(*pieces: list[int]) -> Trail:
    trail = Trail()
    for piece in pieces:
        trail.extend(piece)
    return trail


@given(few_tokens, few_tokens)
def test_places_are_those_of_a_search(tokens, tail):
    """As many as are tried, in the same order; a bucket of several pairs takes tries away."""
    found, expected = trail_of(tokens).matches(tail[-MAX_MATCH:]), searched(tokens, tail)
    assert found == [match for match in expected if match in set(found)]
    assert len(found) >= min(1, len(expected))
    assert found[:1] == expected[:1]


@given(any_tokens, st.lists(st.integers(1, 200), max_size=5))
def test_pieces_make_no_difference(tokens, cuts):
    """Tokens that come one by one, in pieces, or all at once are found at the same places."""
    at_once, one_by_one = trail_of(tokens), trail_of(*([token] for token in tokens))
    in_pieces = trail_of(*(tokens[begin:end] for begin, end in pairwise([0, *sorted(cuts), len(tokens) + 200])))
    tails = [tokens[max(0, end - MAX_MATCH) : end] for end in range(len(tokens) + 1)]
    assert len(at_once) == len(one_by_one) == len(in_pieces) == len(tokens)
    for tail in tails:
        expected = searched(tokens, tail)
        for trail in (at_once, one_by_one, in_pieces):
            assert trail.matches(tail) == expected


def test_many_tokens_are_linked_as_few_are():
    """Beyond some number arrays take over from the loop, and buckets grow with the tokens."""
    tokens = [number * number % 97 for number in range(5000)]
    at_once, one_by_one = trail_of(tokens), trail_of(*([token] for token in tokens))
    for end in range(0, 5000, 37):
        assert at_once.matches(tokens[end : end + 8]) == one_by_one.matches(tokens[end : end + 8])


def test_a_trail_that_ends_goes_on_from_where_it_was_followed():
    """What repeats itself is continued for longer than one period."""
    trail = trail_of([9, 1, 2, 3, 1, 2, 3])
    assert list(trail.go_on(4, 8)) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert list(trail.go_on(1, 2)) == [1, 2]
