"""What is wrong with the results of a case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import isclose

from clients.conformance.cases import Case, Expected, ExpectedError
from clients.conformance.result import Failure, Logprob, Result

_LOGPROB_TOLERANCE = 1e-4
"""Requests that run beside others are computed in other shapes."""
_OF_THE_CALL = ("deltas", "logprobs", "cancelled", "error")
"""Fields of a result that need not equal those of another call."""


def problems(case: Case, results: Sequence[Result], reference: Result | None) -> Iterator[str]:
    """Each in a sentence; `reference` is what a direct call gave, None where the case ends otherwise."""
    if len(results) != case.streams * case.repeat:
        yield f"{len(results)} results of {case.streams * case.repeat} calls"
    for result in results:
        if case.expect.error is not None:
            yield from _of_error(case.expect.error, result)
        elif result.error is not None:
            yield f"{result.error.code}: {result.error.message}"
        elif reference is not None:
            yield from _differences(result, reference)
            yield from _of_output(case.expect, result)
        if result.cancelled is not case.expect.cancelled:
            yield f"cancelled is {result.cancelled}"
        yield from _of_deltas(case, result)


def _of_error(expected: ExpectedError, result: Result) -> Iterator[str]:
    error = result.error
    if error is None:
        yield f"no error, but {result.text!r}"
        return
    if error.code != expected.code:
        yield f"{error.code} in place of {expected.code}: {error.message}"
    if not error.message:
        yield "an error without a message"
    yield from _of_details(expected, error)


def _of_details(expected: ExpectedError, error: Failure) -> Iterator[str]:
    described = [description for field, description in error.fields if field == expected.field]
    if expected.field is not None and not described:
        yield f"the fields are {list(error.fields)}, without {expected.field}"
    elif expected.description is not None and expected.description not in described[0]:
        yield f"{expected.description!r} is not in {described[0]!r}"
    for name in ("reason", "domain"):
        wanted, found = getattr(expected, name), getattr(error, name)
        if wanted is not None and found != wanted:
            yield f"{name} is {found!r}, not {wanted!r}"
    if expected.retry_delay and not error.retry_delay_s:
        yield "no time after which to try again"


def _differences(result: Result, reference: Result) -> Iterator[str]:
    for name in (each.name for each in fields(Result) if each.name not in _OF_THE_CALL):
        found, wanted = getattr(result, name), getattr(reference, name)
        if found != wanted:
            yield f"{name} is {found!r}, not {wanted!r}"
    if not _close(result.logprobs, reference.logprobs):
        yield f"logprobs are {result.logprobs}, not {reference.logprobs}"


def _close(found: Sequence[Logprob], wanted: Sequence[Logprob]) -> bool:
    def same(one: Logprob, other: Logprob) -> bool:
        ones, others = ((one.token_id, one.logprob), *one.top), ((other.token_id, other.logprob), *other.top)
        return len(ones) == len(others) and all(
            a[0] == b[0] and isclose(a[1], b[1], abs_tol=_LOGPROB_TOLERANCE) for a, b in zip(ones, others, strict=True)
        )

    return len(found) == len(wanted) and all(
        one.rank == other.rank and same(one, other) for one, other in zip(found, wanted, strict=True)
    )


def _of_output(expected: Expected, result: Result) -> Iterator[str]:
    for part in expected.contains:
        if part not in result.text:
            yield f"{part!r} is not in {result.text!r}"
    if expected.finish is not None and result.finish_reason != f"FINISH_REASON_{expected.finish}":
        yield f"it ended with {result.finish_reason}, not {expected.finish}"
    if expected.stop_string is not None and result.stop_string != expected.stop_string:
        yield f"the stop string is {result.stop_string!r}, not {expected.stop_string!r}"
    if expected.logprobs is not None and len(result.logprobs) != expected.logprobs:
        yield f"{len(result.logprobs)} tokens have logprobs, not {expected.logprobs}"


def _of_deltas(case: Case, result: Result) -> Iterator[str]:
    if case.call in ("text", "chat_text"):
        if result.deltas != 0:
            yield f"{result.deltas} deltas of a call for the whole text"
    elif case.cancel_after is not None and result.deltas != case.cancel_after:
        yield f"{result.deltas} deltas, though the stream is left after {case.cancel_after}"
    elif result.deltas < case.expect.min_deltas:
        yield f"{result.deltas} deltas; the text comes in {case.expect.min_deltas} or more"
