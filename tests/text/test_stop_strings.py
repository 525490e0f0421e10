"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.text.stop_strings import StopMatcher


def search(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The naive search over the whole text: the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end] if include_stop else text[: end - len(stop)], stop
    return text, None


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[list[str], str | None]:
    sent: list[str] = []
    for piece in pieces:
        text, matched = matcher.push(piece)
        sent.append(text)
        if matched is not None:
            return sent, matched
    return [*sent, matcher.flush()], None


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text("ab☃", max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    edges = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in pairwise(edges)]


@given(cut_texts(), st.lists(st.text("ab☃", min_size=1, max_size=6), max_size=4), st.booleans())
def test_equals_the_naive_search_however_the_text_is_cut(
    cut: tuple[str, list[str]], stops: list[str], include_stop: bool
) -> None:
    """Any cutting gives the text and the match of a search over the whole text."""
    text, pieces = cut
    sent, matched = run(StopMatcher(stops, include_stop), pieces)
    assert ("".join(sent), matched) == search(text, stops, include_stop)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_holds_back_exactly_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    """After each character, the unsent tail is the longest that begins a stop string, and no longer."""
    matcher = StopMatcher(stops)
    sent = ""
    for end, character in enumerate(text, start=1):
        piece, matched = matcher.push(character)
        if matched is not None:
            return
        sent += piece
        tails = [text[start:end] for start in range(end + 1)]
        assert text[len(sent) : end] == next(tail for tail in tails if any(stop.startswith(tail) for stop in stops))


def test_a_stop_string_may_span_many_pieces() -> None:
    """Nothing of a stop string is sent, though it comes character by character."""
    sent, matched = run(StopMatcher(["\n\nUser:"]), list("Yes.\n\nUser: no"))
    assert (sent, matched) == (["Y", "e", "s", ".", "", "", "", "", "", "", ""], "\n\nUser:")


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        pytest.param(["abcd", "bc"], "xabcd", ("xa", "bc"), id="the-one-that-ends-first"),
        pytest.param(["bc", "abc"], "xabc", ("x", "abc"), id="ending-together-the-longer"),
        pytest.param(["aab"], "aaab", ("a", "aab"), id="overlap-with-itself"),
    ],
)
def test_the_first_stop_string_wins(stops: list[str], text: str, expected: tuple[str, str]) -> None:
    """The match that ends first wins, then the one that starts first."""
    assert StopMatcher(stops).push(text) == expected


def test_text_after_a_match_is_dropped() -> None:
    """Once a stop string has matched, later text and flush give nothing."""
    matcher = StopMatcher(["."], include_stop=True)
    assert matcher.push("One. Two.") == ("One.", ".")
    assert matcher.push("Three.") == ("", ".")
    assert matcher.flush() == ""


def test_without_stop_strings_all_text_passes() -> None:
    """No stop strings: nothing is held back."""
    assert StopMatcher([]).push("any text") == ("any text", None)
