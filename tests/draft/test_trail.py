"""Hash chains beside a search through all tokens."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.draft.trail import MAX_MATCH, MIN_MATCH, Trail

few_tokens = st.lists(st.integers(0, 3), max_size=60)
"""So few different ones that they often stand together again."""
LARGEST = 2**31 - 1
any_tokens = st.lists(st.integers(0, LARGEST), max_size=300)


def searched(tokens: list[int], tail: list[int]) -> list[tuple[int, int]]:
    """All places, the newest first."""
    found = []
    for end in range(len(tokens) - 1, 0, -1):
        same = 0
        while same < min(end, len(tail), MAX_MATCH) and tokens[end - same - 1] == tail[-same - 1]:
            same += 1
        if same >= MIN_MATCH:
            found.append((same, end))
        if same == MAX_MATCH:
            break
    return found


def trail_of(*pieces: list[int]) -> Trail:
    trail = Trail()
    for piece in pieces:
        trail.extend(piece)
    return trail


@given(few_tokens, few_tokens)
def test_places_are_those_of_a_search(tokens, tail):
    """As many as are tried, in the same order; a bucket of several pairs takes tries away."""
    found, expected = trail_of(tokens).matches(trail_of(tail).tail), searched(tokens, tail)
    assert found == [match for match in expected if match in set(found)]
    assert len(found) >= min(1, len(expected))
    assert found[:1] == expected[:1]


@given(any_tokens, st.lists(st.integers(1, 200), max_size=5))
def test_pieces_make_no_difference(tokens, cuts):
    """Tokens that come one by one, in pieces, or all at once are found at the same places."""
    at_once, one_by_one = trail_of(tokens), trail_of(*([token] for token in tokens))
    in_pieces = trail_of(*(tokens[begin:end] for begin, end in pairwise([0, *sorted(cuts), len(tokens) + 200])))
    tails = [trail_of(tokens[:end]).tail for end in range(len(tokens) + 1)]
    assert len(at_once) == len(one_by_one) == len(in_pieces) == len(tokens)
    for tail in tails:
        expected = searched(tokens, tail)
        for trail in (at_once, one_by_one, in_pieces):
            assert trail.matches(tail) == expected


@given(st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 1), max_size=2)), max_size=12))
def test_a_place_that_is_followed_is_still_one(pieces):
    """However long a trail went on as at a place before, and wherever it leaves it."""
    trail, tokens = Trail(), list(range(12)) * 2
    trail.extend(tokens)
    for count, others in pieces:
        piece = [*(tokens * 2)[4 : 4 + count], *others]
        tokens += piece
        trail.extend(piece)
        expected = searched(tokens, list(trail.tail))
        found = trail.repeats()
        assert max(found, default=(0, 0))[0] == max(expected, default=(0, 0))[0]
        assert all(tokens[end - same : end] == tokens[-same:] and end < len(tokens) for same, end in found)


def test_many_tokens_are_linked_as_few_are():
    """Beyond some number arrays take over from the loop, and buckets grow with the tokens."""
    tokens = [number % 700 for number in range(5000)]
    pieces = (tokens[begin : begin + 500] for begin in range(0, 5000, 500))
    trails = [trail_of(tokens), trail_of(*pieces), trail_of(*([token] for token in tokens))]
    for end in range(8, 5000, 37):
        tail = trail_of(tokens[end - 8 : end]).tail
        first, *others = (trail.matches(tail) for trail in trails)
        assert {place % 700 for _, place in first} == {end % 700}
        assert others == [first, first]


def test_a_trail_that_ends_goes_on_from_where_it_was_followed():
    """What repeats itself is continued for longer than one period."""
    trail = trail_of([9, 1, 2, 3, 1, 2, 3])
    assert list(trail.go_on(4, 8)) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert list(trail.go_on(1, 2)) == [1, 2]
