"""What the suite finds wrong: each expectation with a result that fails it, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clients.conformance.cases import Case, Expected, ExpectedError, Identity, Suite, filled_in
from clients.conformance.judge import problems
from clients.conformance.result import Failure, Logprob, Result
from clients.conformance.run import Outcome
from clients.conformance.table import conformance_table, replace_tables

TOP = (Logprob(5, -0.1, 1, ((5, -0.1), (7, -2.0))),)
GOOD = Result("one two", 2, (5, 6), TOP, 3, 2, "FINISH_REASON_STOP_STRING", "x")
ERROR = Failure("INVALID_ARGUMENT", "wrong", (("a.b", "is outside"),), 1.0, "R", "hsrpc", {})
FAILED = replace(GOOD, text="", deltas=0, token_ids=(), logprobs=(), finish_reason=None, error=ERROR)
EXPECTED = Expected(min_deltas=2, contains=("two",), finish="STOP_STRING", stop_string="x", logprobs=1)
EXPECTED_ERROR = ExpectedError(
    code="INVALID_ARGUMENT", field="a.b", description="outside", reason="R", domain="hsrpc", retry_delay=True
)


def case(**settings) -> Case:
    return Case(name="it", about="", call="generate", request={}, **settings)


def found(case: Case, *results: Result) -> list[str]:
    reference = None if case.expect.error or case.expect.cancelled else GOOD
    return list(problems(case, results, reference))


def test_what_is_right_is_not_found_wrong():
    """Output, an error, a stream that was left, and the whole text."""
    assert found(case(expect=EXPECTED), GOOD) == []
    assert found(case(expect=Expected(error=EXPECTED_ERROR)), FAILED) == []
    assert found(case(expect=Expected(cancelled=True), cancel_after=2), replace(GOOD, cancelled=True)) == []
    assert found(replace(case(), call="text"), replace(GOOD, deltas=0)) == []
    near = replace(GOOD, logprobs=(TOP[0]._replace(logprob=-0.100001),))
    assert found(case(streams=2), GOOD, near) == []


@pytest.mark.parametrize(
    "change",
    [
        {"text": "one tw"},
        {"text": "one two "},
        {"deltas": 1},
        {"token_ids": (5,)},
        {"prompt_tokens": 4},
        {"completion_tokens": 3},
        {"finish_reason": None},
        {"finish_reason": "FINISH_REASON_EOS"},
        {"stop_string": None},
        {"logprobs": ()},
        {"logprobs": (TOP[0]._replace(rank=2),)},
        {"logprobs": (TOP[0]._replace(logprob=-0.2),)},
        {"logprobs": (TOP[0]._replace(top=((5, -0.1),)),)},
        {"logprobs": (TOP[0]._replace(top=((5, -0.1), (8, -2.0))),)},
        {"cancelled": True},
        {"error": ERROR},
    ],
    ids=str,
)
def test_a_wrong_output_is_found(change):
    """Each part of it."""
    assert found(case(expect=EXPECTED), replace(GOOD, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"code": "INTERNAL"},
        {"message": ""},
        {"fields": ()},
        {"fields": (("a", "is outside"),)},
        {"fields": (("a.b", "is wrong"),)},
        {"reason": None},
        {"domain": "other"},
        {"retry_delay_s": None},
        {"retry_delay_s": 0},
    ],
    ids=str,
)
def test_a_wrong_error_is_found(change):
    """Each of its details."""
    expected = Expected(error=EXPECTED_ERROR)
    assert found(case(expect=expected), replace(FAILED, error=replace(ERROR, **change)))
    assert found(case(expect=expected), GOOD)


def test_wrong_counts_are_found():
    """Results, deltas of a whole text, and a stream that was to be left."""
    assert found(case(streams=2), GOOD) == ["1 results of 2 calls"]
    assert found(replace(case(), call="text"), GOOD) == ["2 deltas of a call for the whole text"]
    left = case(expect=Expected(cancelled=True), cancel_after=1)
    assert found(left, replace(GOOD, cancelled=True)) == ["2 deltas, though the stream is left after 1"]
    assert found(left, replace(GOOD, deltas=1)) == ["cancelled is False"]


def test_every_case_can_be_read():
    """Their names are distinct, and their servers there; an unknown word in one is refused."""
    suite = Suite.load()
    assert len({case.name for case in suite.cases}) == len(suite.cases) >= 20
    assert {case.server for case in suite.cases} == set(suite.servers)
    with pytest.raises(ValueError, match="tokens in"):
        Case.read({"name": "it", "about": "", "call": "text", "request": {}, "tokens": 3})
    with pytest.raises(ValueError, match="'no such' is no case; there are: 'streamed text', "):
        suite.named(["no such"])
    assert suite.named(["cancel"]).cases[0].client == Identity()


def test_requests_are_filled_in():
    """What stands for ids, a bias and a long text."""
    request = {
        "a": {"$tokens": "xy"},
        "b": [{"$repeat": {"text": "z", "times": 3}}],
        "c": {"$bias": {"text": "x", "by": 8}},
    }
    assert filled_in(request, lambda text: [ord(each) for each in text]) == {
        "a": [120, 121],
        "b": ["zzz"],
        "c": {"120": 8},
    }


def test_the_table_says_what_failed_and_what_did_not_run():
    """And is put between the marks of a page."""
    suite = Suite.load().named(["cancel", "seed", "chat"])
    outcomes = [Outcome("python", "cancel", (), 0.1), Outcome("python", "seed", ("wrong",), 0.1)]
    table = "| case | Python |\n|---|---|\n| cancel | yes |\n| seed | **no** |\n| chat | - |"
    assert conformance_table(suite, outcomes) == table
    page = "a\n<!-- table: t -->\nold\n<!-- end -->\nb <!-- end -->\n"
    assert replace_tables(page, {"t": table}) == page.replace("old", table)
    with pytest.raises(ValueError, match="no place for a table"):
        replace_tables("a", {"t": table})
