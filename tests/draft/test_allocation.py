"""Draft lengths: within the room, more for those that accept more, none where it does not pay, and near the best."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.draft.acceptance import Acceptance, AcceptanceEstimates
from hsrpc.draft.allocation import MIN_IDLE, Draftable, StepPrice, allocate
from tests.draft.test_acceptance import accepted

STREAMING = StepPrice(step_seconds=0.4, row_seconds=5e-5, free_rows=0, spare_seconds=0.3, max_rows=100_000)
"""6,000 rows while the weights come."""
RESIDENT = StepPrice(step_seconds=0.01, row_seconds=2e-5, free_rows=16, max_rows=100_000)
PRICES = {"streaming": STREAMING, "resident": RESIDENT}

chances = st.floats(0, 1)
requests_of = st.lists(st.builds(Draftable, st.builds(Acceptance, chances, st.integers(0, 100)), st.integers(0, 12)))
prices = st.builds(
    StepPrice,
    step_seconds=st.floats(1e-3, 1),
    row_seconds=st.floats(0, 1e-1),
    free_rows=st.integers(0, 64),
    spare_seconds=st.floats(0, 1),
    max_rows=st.integers(0, 100),
)


def busy(chance: float, max_tokens: int = 15) -> Draftable:
    return Draftable(Acceptance(chance, 0), max_tokens)


def rate(requests: list[Draftable], counts: list[int], price: StepPrice) -> float:
    """Tokens a second."""
    tokens = sum(each.acceptance.expected_tokens(count) for each, count in zip(requests, counts, strict=True))
    return tokens / seconds(price, sum(counts))


def seconds(price: StepPrice, rows: int) -> float:
    compute = max(0, rows - price.free_rows) * price.row_seconds
    return price.step_seconds + max(0.0, compute - price.spare_seconds)


@given(requests_of, prices)
def test_lengths_are_within_the_room(requests, price):
    """One for each request, at most what it may have, and all at most what the step has room for."""
    counts = allocate(requests, price)
    assert len(counts) == len(requests)
    assert all(0 <= count <= each.max_tokens for count, each in zip(counts, requests, strict=True))
    assert sum(counts) <= price.max_rows


@given(requests_of.filter(bool), prices, st.data())
def test_more_acceptance_is_never_less_draft(requests, price, data):
    requests = [replace(each, acceptance=each.acceptance._replace(num_idle=0)) for each in requests]
    number = data.draw(st.integers(0, len(requests) - 1))
    better = data.draw(st.floats(requests[number].acceptance.chance, 1))
    improved = [*requests]
    improved[number] = busy(better, requests[number].max_tokens)
    assert allocate(improved, price)[number] >= allocate(requests, price)[number]


@given(requests_of, prices)
def test_the_better_of_two_that_may_have_as_many_gets_no_less(requests, price):
    requests = [replace(each, acceptance=each.acceptance._replace(num_idle=0), max_tokens=9) for each in requests]
    counts = allocate(requests, price)
    in_order = sorted(range(len(requests)), key=lambda number: (requests[number].acceptance.chance, -number))
    assert [counts[number] for number in in_order] == sorted(counts)


@given(st.lists(st.tuples(st.floats(0.1, 0.95), st.integers(0, 3)), min_size=1, max_size=3), prices)
def test_no_other_lengths_are_faster(drawn, price):
    """Beside all that there are."""
    requests = [busy(chance, max_tokens) for chance, max_tokens in drawn]
    best = max(
        rate(requests, list(counts), price)
        for counts in product(*(range(each.max_tokens + 1) for each in requests))
        if sum(counts) <= price.max_rows
    )
    found = rate(requests, allocate(requests, price), price)
    assert found == pytest.approx(best, rel=0.03)  # what gains next to nothing is left out
    assert found <= best * (1 + 1e-9)


@given(requests_of.filter(bool))
def test_nothing_is_drafted_where_a_row_costs_more_than_it_can_gain(requests):
    """But for probes, of which there is one at a time."""
    price = StepPrice(step_seconds=0.01, row_seconds=0.0101, max_rows=1000)
    counts = allocate(requests, price)
    idle = [each for each in requests if each.acceptance.num_idle >= MIN_IDLE and each.max_tokens]
    assert sum(map(bool, counts)) == min(1, len(idle))


def test_rows_beside_the_bus_are_filled_with_what_gains():
    """6,000 rows are free: all that have a chance take part, and others do not."""
    counts = allocate([busy(0.9), busy(0.5), busy(0.005)], STREAMING)
    assert counts == [15, 6, 0]


def test_the_gpu_stays_below_the_bus_where_a_row_gains_little():
    """400 requests want 15 each of the 2,000 rows that the bus hides; one more row gains less than it costs."""
    price = replace(STREAMING, spare_seconds=0.1)
    counts = allocate([busy(0.7)] * 400, price)
    assert sum(counts) == 2000


def test_rows_that_cost_are_drafted_only_where_they_pay():
    """A row of 20 us in 10 ms, for 64 resident requests, has to gain a part of 64 tokens."""
    counts = allocate([*[busy(0.95)] * 32, *[busy(0.1)] * 32], replace(RESIDENT, free_rows=0))
    assert min(counts[:32]) > 3
    assert counts[32:] == [0] * 32


def idle(steps: int, chance: float = 0.03) -> Draftable:
    return Draftable(Acceptance(chance, steps), 15)


def test_those_that_fail_are_tried_now_and_then():
    """The one that has waited longest, when it has waited long enough."""
    price = replace(RESIDENT, free_rows=0, row_seconds=1e-3)
    assert allocate([idle(MIN_IDLE - 1)] * 3, price) == [0, 0, 0]
    assert [bool(count) for count in allocate([idle(MIN_IDLE), idle(MIN_IDLE + 1), idle(0)], price)] == [0, 1, 0]


def test_probes_are_many_where_they_cost_nothing():
    assert all(allocate([idle(MIN_IDLE, 0.005)] * 50, STREAMING))
    assert sum(map(bool, allocate([idle(MIN_IDLE, 0.005)] * 50, replace(RESIDENT, free_rows=0)))) == 1


@pytest.mark.parametrize("kind", PRICES)
@pytest.mark.parametrize("num_requests", [1, 40])
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.8, 0.95, (0.05, 0.95), (0.1, 0.4, 0.7, 0.9)])
def test_lengths_come_near_the_best_fixed_one(kind, num_requests, chance):
    """With acceptance known, no length that all requests have is faster; learnt on the way it costs a few percent."""
    price = PRICES[kind]
    spread = chance if isinstance(chance, tuple) else (chance,)
    true = [spread[number % len(spread)] for number in range(num_requests)]
    known = [busy(each) for each in true]
    best = max(rate(known, [length] * num_requests, price) for length in range(16))
    assert rate(known, allocate(known, price), price) >= 0.97 * best

    estimates, rng = AcceptanceEstimates(), random.Random(0)
    tokens = time = 0.0
    for step in range(150):
        counts = allocate([Draftable(estimates.of(str(number)), 15) for number in range(num_requests)], price)
        for number, count in enumerate(counts):
            if count:
                estimates.note(str(number), count, accepted(true[number], count, rng))
            else:
                estimates.pass_over(str(number))
        if step >= 30:
            tokens += sum(known[number].acceptance.expected_tokens(count) for number, count in enumerate(counts))
            time += seconds(price, sum(counts))
    assert tokens / time >= 0.9 * best
