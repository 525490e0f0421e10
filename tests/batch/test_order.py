"""The order of a window: shared prefixes together, long outputs first, each line once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.batch.call import read_call
from hsrpc.batch.line import Endpoint, read_line
from hsrpc.batch.order import Job, arranged
from hsrpc.batch.refusal import Refusal
from tests.batch.support import chat, completion

PREFIX = "You are a helpful assistant that knows all about foxes. " * 6
"""More than the characters that count as shared."""


def job(number: int, prompt: object, max_tokens: int | None = None) -> Job:
    endpoint = Endpoint.COMPLETIONS if max_tokens else Endpoint.CHAT
    if max_tokens:
        body = completion("a", prompt=prompt, max_tokens=max_tokens)["body"]
    else:
        body = chat("a", messages=[{"role": "user", "content": prompt}])["body"]
    return Job(read_line(number, b"x"), read_call(endpoint, body))


def order(*jobs: Job) -> list[int]:
    return [each.line.number for each in arranged(jobs)]


def test_long_outputs_come_first():
    """By max_tokens; those to the end of the context before all, equals in the order of the file."""
    assert order(job(1, "a", 5), job(2, "b", 9), job(3, "c"), job(4, "d", 5), job(5, "e", 9)) == [3, 2, 5, 1, 4]


def test_prompts_with_a_prefix_run_together():
    """At the place of the longest of them, and in order of length among themselves."""
    jobs = (job(1, f"{PREFIX}a", 5), job(2, "b", 7), job(3, f"{PREFIX}c", 9), job(4, "d", 20), job(5, f"{PREFIX}e", 6))
    assert order(*jobs) == [4, 3, 5, 1, 2]


def test_prefixes_within_a_prefix():
    """Those that share more of it are neighbours."""
    deeper = PREFIX + "Today they live in the mountains. " * 10
    jobs = (job(1, f"{deeper}a", 5), job(2, f"{PREFIX}b", 7), job(3, f"{deeper}c", 6), job(4, f"{PREFIX}d", 4))
    assert order(*jobs) == [2, 3, 1, 4]


def test_token_ids_share_prefixes_as_text_does():
    """Some hundred ids."""
    ids = list(range(300))
    assert order(job(1, [*ids, 1], 5), job(2, [7, 8], 6), job(3, [*ids, 2], 9)) == [3, 1, 2]


def test_what_is_refused_costs_nothing():
    """It comes last."""
    refused = Job(read_line(1, b"x"), Refusal(400, "no"))
    assert order(refused, job(2, "a", 1)) == [2, 1]


@given(st.lists(st.tuples(st.sampled_from(["", PREFIX, 2 * PREFIX]), st.text(max_size=3), st.integers(1, 3))))
def test_no_line_is_lost_or_twice(prompts):
    """Whatever they share."""
    jobs = [job(number, prefix + text, length) for number, (prefix, text, length) in enumerate(prompts)]
    assert sorted(order(*jobs)) == list(range(len(jobs)))
