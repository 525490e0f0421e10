"""What drafters propose: right where texts repeat, never too much, and nothing of other salts."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.draft.ngrams import NgramDrafter
from hsrpc.draft.suffix import SuffixDrafter

DRAFTERS = [NgramDrafter, SuffixDrafter]
TEXT = [50, 7, 90, 31, 12, 66, 43, 28, 75, 19]
every_drafter = pytest.mark.parametrize("kind", DRAFTERS)


def wanted(tokens: list[int], *, request: str = "a", salt: str = "", prompt: int = 1, max_tokens: int = 8) -> Wanted:
    return Wanted(request, salt, tokens, prompt, max_tokens)


def draft(drafter: Drafter, tokens: list[int], **asked) -> list[int]:
    [found] = drafter.draft([wanted(tokens, **asked)])
    return list(found)


def write(drafter: Drafter, tokens: list[int], *, request: str, salt: str, prompt: int = 1) -> None:
    """A request that writes these tokens and ends."""
    draft(drafter, tokens, request=request, salt=salt, prompt=prompt)
    drafter.forget([request])


@every_drafter
@given(
    period=st.lists(st.integers(0, 50), min_size=3, max_size=12, unique=True),
    more=st.integers(4, 40),
    max_tokens=st.integers(1, 40),
)
def test_a_text_that_repeats_itself_is_continued(kind, period, more, max_tokens):
    """Also beyond its end, for as long as is asked or as is likely."""
    text = list(islice(cycle(period), len(period) + more + max_tokens))
    found = draft(kind(), text[: len(period) + more], max_tokens=max_tokens)
    assert found
    assert found == text[len(period) + more :][: len(found)]
    assert len(found) == max_tokens or kind is SuffixDrafter


@every_drafter
@settings(max_examples=40)
@given(data=st.data())
def test_drafts_are_never_too_long_and_of_tokens_that_were_seen(kind, data):
    """Whatever comes, in whatever pieces, of many requests at once, some of which end."""
    drafter, texts = kind(), dict[str, list[int]]()
    for _ in range(data.draw(st.integers(1, 6))):
        batch = []
        for name in data.draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)):
            text = texts.setdefault(name, [])
            text += data.draw(st.lists(st.sampled_from([0, 1, 2**31 - 1]), max_size=20).map(lambda few: few * 5))
            max_tokens = data.draw(st.integers(1, 300))
            batch.append(wanted(text, request=name, salt=name.upper()[:1], prompt=2, max_tokens=max_tokens))
        found = drafter.draft(batch)
        assert len(found) == len(batch)
        for each, proposed in zip(batch, found, strict=True):
            assert len(proposed) <= each.max_tokens
            assert set(proposed) <= {0, 1, 2**31 - 1}
        ended = data.draw(st.lists(st.sampled_from("abcdefgh"), max_size=2))
        drafter.forget(ended)
        for name in ended:
            texts.pop(name, None)


@every_drafter
@pytest.mark.parametrize("tokens", [[], [5], [5, 6], [2**31 - 1, 0, 2**31 - 2]])
def test_a_text_that_does_not_repeat_itself_has_no_draft(kind, tokens):
    assert draft(kind(), tokens) == []


@every_drafter
def test_forgotten_requests_leave_nothing(kind):
    """A request of the same name begins anew."""
    drafter = kind()
    assert draft(drafter, TEXT + TEXT[:4], prompt=14) == TEXT[4:] + TEXT[:2] or kind is SuffixDrafter
    drafter.forget(["a", "never seen"])
    assert drafter.num_tokens == 0
    assert draft(drafter, [3, 4, *TEXT[:4]], prompt=6) == []


def test_the_longest_match_is_followed_and_of_equal_ones_the_newest():
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 51, 8, 3, 4, 52, 7, 3, 4, 53, 6]
    drafter = NgramDrafter(min_match=2)
    assert draft(drafter, [*text, 1, 2, 3, 4], max_tokens=1) == [50]
    assert draft(NgramDrafter(min_match=2), [*text, 0, 2, 3, 4], max_tokens=1) == [51]
    assert draft(NgramDrafter(min_match=2), [*text, 0, 0, 3, 4], max_tokens=1) == [53]
    assert draft(NgramDrafter(min_match=3), [*text, 0, 0, 3, 4], max_tokens=1) == []


def test_the_most_frequent_continuation_is_followed():
    """Places where equally many tokens are the same outvote the newest, which says something else."""
    seen = [4, 5, 6, 70, 1, 4, 5, 6, 70, 2, 4, 5, 6, 70, 3, 4, 5, 6, 80]
    assert draft(SuffixDrafter(), [*seen, 9, 4, 5, 6], max_tokens=1) == [70]


def test_a_draft_ends_where_places_part():
    """Nine tokens are the same at all of them, then each goes on in its own way."""
    common = list(range(100, 109))
    text = [token for last in range(6) for token in (*common, last, last + 50)] + common[:4]
    assert draft(SuffixDrafter(min_chance=0.3), text, max_tokens=8) == common[4:]


def test_a_draft_is_as_long_as_more_tokens_are_the_same():
    text = list(range(200))
    ends = [[*text, 999, *text[50 : 50 + same]] for same in (2, 4, 8, 16)]
    lengths = [len(draft(SuffixDrafter(min_chance=0.4), tokens, max_tokens=64)) for tokens in ends]
    assert lengths == sorted(set(lengths))


def test_outputs_teach_requests_of_their_salt_and_no_others():
    drafter = SuffixDrafter()
    write(drafter, [1, *TEXT], request="first", salt="x")
    assert draft(drafter, [2, *TEXT[:4]], request="second", salt="x")[:3] == TEXT[4:7]
    assert draft(drafter, [2, *TEXT[:4]], request="third", salt="y") == []


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.lists(st.integers(0, 4), min_size=1, max_size=30)), max_size=20))
def test_a_tenant_sees_what_it_would_see_alone(work):
    """Drafts are the same whether or not others are served."""
    together, alone = SuffixDrafter(), {salt: SuffixDrafter() for salt in "xyz"}
    for number, (salt, tokens) in enumerate(work):
        name = str(number)
        asked = {"request": name, "salt": salt}
        assert draft(together, tokens, **asked) == draft(alone[salt], tokens, **asked)
        together.forget([name])
        alone[salt].forget([name])


def test_prompts_are_not_told_to_others():
    """But for their last tokens, which say where an output begins."""
    drafter = SuffixDrafter()
    write(drafter, [*TEXT, *range(200, 300), 1, 2, 3], request="first", salt="x", prompt=110)
    assert draft(drafter, [0, *TEXT[:4]], request="second", salt="x") == []
    assert draft(drafter, [0, 298, 299], request="third", salt="x")[:2] == [1, 2]


def test_no_draft_reaches_into_another_output():
    drafter = SuffixDrafter(min_chance=0.0)
    write(drafter, [0, *TEXT], request="first", salt="x")
    write(drafter, [0, *range(30, 40)], request="second", salt="x")
    assert draft(drafter, [0, *TEXT[:4]], request="third", salt="x", max_tokens=30) == TEXT[4:]


def test_the_oldest_outputs_of_a_salt_are_dropped():
    drafter = SuffixDrafter(max_of_salt=100)
    for number in range(100):
        write(drafter, [number * 20 + token for token in range(20)], request="one", salt="x")
        assert drafter.num_tokens <= 100
    assert draft(drafter, [99 * 20, 99 * 20 + 1], request="new", salt="x")
    assert draft(drafter, [0, 1], request="old", salt="x") == []
    write(drafter, list(range(5000)), request="long", salt="x")
    drafter.forget(["new", "old"])
    assert 0 < drafter.num_tokens <= 100


def test_salts_whose_requests_ended_longest_ago_are_dropped():
    drafter = SuffixDrafter(max_of_salt=1000, max_kept=100)
    for salt in ("a", "b", "a", "c"):
        write(drafter, list(range(40)), request="one", salt=salt)
    assert drafter.num_tokens <= 100
    assert draft(drafter, [0, 1, 2], request="c", salt="c")
    assert draft(drafter, [0, 1, 2], request="b", salt="b") == []
