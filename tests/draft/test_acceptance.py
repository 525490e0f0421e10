"""Estimates of what becomes of drafts, beside what they were drawn from."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.draft.acceptance import Acceptance, AcceptanceEstimates

notes = st.integers(0, 20).flatmap(lambda drafted: st.tuples(st.just(drafted), st.integers(0, drafted)))


def accepted(chance: float, num_drafted: int, rng: random.Random) -> int:
    """Tokens that are right, of so many, where each is as likely to be as the one before."""
    return next((depth for depth in range(num_drafted) if rng.random() >= chance), num_drafted)


@given(st.lists(st.tuples(st.sampled_from("abc"), notes), max_size=60))
def test_a_chance_stays_one(steps):
    """Whatever is noted, it is between 0 and 1, and so are the tokens of a step between 1 and all."""
    estimates = AcceptanceEstimates()
    for request, (drafted, right) in steps:
        estimates.note(request, drafted, right)
        found = estimates.of(request)
        assert 0 < found.chance < 1
        assert 1 <= found.expected_tokens(7) <= 8


def test_tau_is_a_geometric_sum():
    assert [Acceptance(0.5, 0).expected_tokens(drafted) for drafted in range(4)] == [1, 1.5, 1.75, 1.875]
    assert Acceptance(1.0, 0).expected_tokens(15) == 16
    assert Acceptance(0.0, 0).expected_tokens(15) == 1


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("num_drafted", [1, 4, 15])
def test_estimates_are_near_what_drafts_are_drawn_from(chance, num_drafted):
    """On average over time: what is behind the first wrong token is not counted against it."""
    estimates, rng, seen = AcceptanceEstimates(), random.Random(0), []
    for _ in range(2000):
        estimates.note("a", num_drafted, accepted(chance, num_drafted, rng))
        seen.append(estimates.of("a").chance)
    assert sum(seen[500:]) / 1500 == pytest.approx(chance, abs=0.06)


def test_a_request_that_changes_is_followed_soon():
    """Ten wrong tokens take a good request down, three right drafts bring it up again."""
    estimates = AcceptanceEstimates()
    for _ in range(100):
        estimates.note("a", 4, 4)
    for _ in range(10):
        estimates.note("a", 4, 0)
    assert estimates.of("a").chance < 0.6
    for _ in range(10):
        estimates.note("a", 4, 0)
    assert estimates.of("a").chance < 0.35
    for _ in range(3):
        estimates.note("a", 4, 4)
    assert estimates.of("a").chance > 0.6


def test_new_requests_are_taken_to_be_as_those_before():
    estimates = AcceptanceEstimates()
    first = estimates.of("new").chance
    for number in range(200):
        estimates.note(str(number), 5, 0)
    assert estimates.of("new").chance < first / 2
    estimates.forget([str(number) for number in range(200)])
    assert estimates.of("new").chance < first / 2


def test_requests_do_not_mix():
    estimates = AcceptanceEstimates()
    for _ in range(50):
        estimates.note("good", 5, 5)
        estimates.note("bad", 5, 0)
    assert estimates.of("bad").chance < 0.3 < 0.7 < estimates.of("good").chance


def test_steps_without_a_draft_are_counted():
    """One that was asked for and came back empty is none of them: it was tried."""
    estimates = AcceptanceEstimates()
    for _ in range(3):
        estimates.pass_over("a")
    assert estimates.of("a").num_idle == 3
    chance = estimates.of("a").chance
    estimates.note("a", 0, 0)
    assert estimates.of("a") == Acceptance(chance, 0)


def test_forgotten_requests_leave_nothing():
    estimates = AcceptanceEstimates()
    estimates.note("a", 2, 1)
    estimates.pass_over("b")
    assert len(estimates) == 2
    estimates.forget(["a", "b", "never seen"])
    assert len(estimates) == 0


@pytest.mark.parametrize(("drafted", "right"), [(3, 4), (3, -1), (-1, -1)])
def test_more_right_than_drafted_is_an_error(drafted, right):
    with pytest.raises(ValueError, match=f"num_accepted is {right}"):
        AcceptanceEstimates().note("a", drafted, right)
