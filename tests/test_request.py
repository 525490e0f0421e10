"""Sampling settings are checked when made; a request knows its order, its tokens and the clock of its life."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.errors import InvalidRequestError
from hsrpc.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    Timings,
)
from hsrpc.schedule.request_state import Request

BOUNDS = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "top_k": (0, 2**31 - 1),
    "priority": (-(2**31), 2**31 - 1),
    "max_tokens": (1, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
OPEN_BELOW = {"top_p": (0.0, 1.0), "repetition_penalty": (0.0, 100.0), "time_limit": (0.0, 86_400.0)}
SIZES = {
    "stop": (MAX_STOP_STRINGS, lambda n: [f"s{i}" for i in range(n)]),
    "stop_token_ids": (MAX_STOP_TOKEN_IDS, lambda n: list(range(n))),
    "logit_bias": (MAX_LOGIT_BIAS, lambda n: dict.fromkeys(range(n), 1.0)),
}


def refused(**settings: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**settings)
    return caught.value


@pytest.mark.parametrize("field", BOUNDS | OPEN_BELOW)
def test_bounds_are_allowed_and_what_lies_beyond_is_not(field: str):
    """Each number is allowed up to its bounds; beyond them the error names the field, the value and the range."""
    low, high = (BOUNDS | OPEN_BELOW)[field]
    assert getattr(SamplingParams(**{field: high}), field) == high
    if field in OPEN_BELOW:
        assert str(refused(**{field: low})) == f"{field}: {low} is outside ({low}, {high}]"
    else:
        assert getattr(SamplingParams(**{field: low}), field) == low
    for value in (low - 1, high * 2):
        error = refused(**{field: value})
        assert error.field == field
        assert f"{value} is outside" in error.description


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True])
@pytest.mark.parametrize("field", BOUNDS | OPEN_BELOW)
def test_what_is_no_number_is_refused(field: str, value: float):
    """NaN, infinities and truth values are no settings, in any field."""
    assert refused(**{field: value}).field == field


@pytest.mark.parametrize("field", SIZES)
def test_collections_are_bounded(field: str):
    """As many entries as allowed, and not one more."""
    most, make = SIZES[field]
    assert len(getattr(SamplingParams(**{field: make(most)}), field)) == most
    error = refused(**{field: make(most + 1)})
    assert (error.field, error.description) == (field, f"{most + 1} entries, at most {most} are allowed")


@pytest.mark.parametrize("stop", ["", "x" * (MAX_STOP_LENGTH + 1)])
def test_stop_strings_have_a_length(stop: str):
    """An empty stop string would stop at once; an over-long one holds back too much text."""
    assert f"found {len(stop)}" in refused(stop=["fine", stop]).description


def test_one_stop_string_is_not_a_list():
    """A bare string would mean each of its letters."""
    assert refused(stop="abc").field == "stop"


@pytest.mark.parametrize("bias", [-100.5, 101, math.nan])
def test_biases_are_bounded_one_by_one(bias: float):
    """The error names the token whose bias is wrong."""
    assert refused(logit_bias={3: 1.0, 7: bias}).field == "logit_bias[7]"


@pytest.mark.parametrize(
    ("asked", "in_effect"), [((None, 0), (9, 0)), ((5, 5), (5, 5)), ((10, 10), (9, 9)), ((None, 10), (9, 9))]
)
def test_within_a_room_no_count_is_larger(asked, in_effect):
    """max_tokens is filled in and cut, and min_tokens with it; nothing else changes."""
    params = SamplingParams(max_tokens=asked[0], min_tokens=asked[1], top_k=3, seed=1)
    max_tokens, min_tokens = in_effect
    assert params.within(9) == SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, top_k=3, seed=1)


def test_min_tokens_is_at_most_max_tokens():
    """Equal is allowed; more could never end."""
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    error = refused(min_tokens=6, max_tokens=5)
    assert (error.field, error.description) == ("min_tokens", "6 is more than max_tokens=5")


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (0.01, False), (1.0, False)])
def test_temperature_zero_is_greedy(temperature: float, greedy: bool):
    """Only temperature 0 is greedy."""
    assert SamplingParams(temperature=temperature).is_greedy == greedy


def test_order_is_that_of_being_let_in():
    """Who was let in first comes first; all that were come before those that wait, which keep the order of arrival."""
    requests = [Request(str(i), [1], SamplingParams(priority=-i), i, 0.0) for i in range(4)]
    requests[2].rank, requests[1].rank = 0, 1
    requests.sort(key=lambda request: request.order)
    assert [request.arrival for request in requests] == [2, 1, 0, 3]


@given(prompt=st.lists(st.integers(0, 99), min_size=1), output=st.lists(st.integers(0, 99)))
def test_tokens_are_prompt_then_output(prompt: list[int], output: list[int]):
    """Counts and output follow from the tokens; the caller's prompt is not touched."""
    given_prompt = list(prompt)
    request = Request("r", prompt, SamplingParams(), 0, 0.0)
    request.token_ids += output
    assert prompt == given_prompt
    assert request.token_ids == prompt + output
    assert request.token_ids[request.num_prompt_tokens :] == output
    assert (request.num_prompt_tokens, request.num_output_tokens) == (len(prompt), len(output))
    assert request.num_tokens == len(prompt) + len(output)


def test_timings_add_up():
    """The parts of a life so far: what did not begin is 0."""
    request = Request("r", [1], SamplingParams(), 0, now=10.0)
    assert request.timings(12.0) == Timings(queue=2.0, prefill=0.0, decode=0.0, first_token=2.0)
    request.scheduled_time = 13.0
    assert request.timings(14.0) == Timings(queue=3.0, prefill=1.0, decode=0.0, first_token=4.0)
    request.first_token_time = 15.0
    assert request.timings(20.0) == Timings(queue=3.0, prefill=2.0, decode=5.0, first_token=5.0)
