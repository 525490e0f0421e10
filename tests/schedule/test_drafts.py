"""Drafts take what nobody else wants, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hsrpc.request import FinishReason
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output
from hsrpc.schedule.step import Chunk
from tests.schedule.test_scheduler import LIMITS, Harness, endless, next_token


class Drafting(Harness):
    """A harness whose requests have the drafts that are set, and no others."""

    def draft(self) -> None:
        pass


def drafting(prompts: Sequence[list[int]], num_blocks: int, **limits: object) -> tuple[Drafting, list[Request]]:
    """Requests of these prompts, which have had their first token."""
    harness = Drafting({PoolId.HOST_KV: num_blocks}, replace(LIMITS, **({"max_draft_tokens": 9} | limits)))
    requests = [harness.add(prompt, endless()) for prompt in prompts]
    harness.schedule()
    harness.commit()
    return harness, requests


def right(request: Request, count: int) -> list[int]:
    """What a request goes on with."""
    tokens = list(request.token_ids)
    while len(tokens) < request.num_tokens + count:
        tokens.append(next_token(tokens))
    return tokens[request.num_tokens :]


def wrong(request: Request, count: int) -> list[int]:
    """What it does not go on with, from the first token on."""
    return [right(request, 1)[0] + 1] * count


def chunk_of(harness: Harness, request: Request) -> Chunk:
    assert harness.step is not None
    return next(chunk for chunk in harness.step.chunks if chunk.request is request)


def advance(harness: Harness) -> list[Output]:
    harness.schedule()
    return harness.commit()


def test_a_step_gives_what_was_drafted_and_one_more() -> None:
    harness, [request] = drafting([[1, 2, 3]], 6)
    expected = right(request, 6)
    request.draft = expected[:5]
    [output] = advance(harness)
    assert output.token_ids == tuple(expected)
    assert (request.num_drafted, request.num_accepted) == (5, 5)
    request.draft = [*right(request, 2), *wrong(request, 3)]
    [output] = advance(harness)
    assert len(output.token_ids) >= 3
    assert (harness.scheduler.drafted_tokens, harness.scheduler.accepted_tokens) == (10, 5 + len(output.token_ids) - 1)


def test_blocks_of_rejected_tokens_are_given_back() -> None:
    harness, [request] = drafting([[1, 2, 3]], 6)
    assert len(request.blocks) == 1
    request.draft = wrong(request, 9)
    harness.schedule()
    assert len(request.blocks) == 4  # for 3 + 1 + 9 tokens
    harness.commit()
    assert (len(request.blocks), request.num_computed) == (1, 4)


def test_a_draft_takes_no_block_that_another_needs() -> None:
    """Neither one that runs, which would have to be preempted, nor one that waits."""
    harness, [first, second] = drafting([[1, 2, 3, 4], [5, 6, 7, 8]], 5)
    first.draft = right(first, 9)
    harness.schedule()
    assert len(chunk_of(harness, first).draft) == 7  # it had the last block too, but the second began its own
    harness.commit()
    assert harness.scheduler.preemptions == 0
    assert first.num_tokens == 5 + 8
    assert second.num_tokens == 6


def test_whoever_waits_is_admitted_before_drafts_take_blocks() -> None:
    harness, [first] = drafting([[1, 2, 3]], 4)
    other = harness.add([5, 6, 7, 8, 9], endless(max_tokens=3))
    first.draft = right(first, 9)
    harness.schedule()
    assert chunk_of(harness, other).num_new == 5
    assert len(chunk_of(harness, first).draft) == 4  # the other has two of the blocks, so there is one to draft into
    harness.commit()


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_no_more_is_drafted_than_may_come(keeps_cache: bool) -> None:
    """All drafted tokens and the one behind them are within `max_tokens` and the context, and fit a mini-batch."""
    harness, [request] = drafting([[1, 2, 3]], 6, keeps_cache=keeps_cache, max_idle_prefill_tokens=60)
    [candidate] = harness.scheduler.draft_candidates()
    assert candidate == (request, 9 if keeps_cache else 12 - 4)
    request.max_total_tokens = 8
    [candidate] = harness.scheduler.draft_candidates()
    assert candidate.max_tokens == 8 - 4 - 1
    request.draft = [*right(request, 3), 1, 2, 3]
    [output] = advance(harness)
    assert (len(output.token_ids), output.finish) == (4, FinishReason.CONTEXT_LENGTH)


def test_who_computes_a_prompt_drafts_nothing() -> None:
    """Nor who was preempted: it has no draft when it comes back."""
    harness, [request] = drafting([list(range(1, 20))], 6)
    assert harness.scheduler.draft_candidates() == []
    while not request.num_output_tokens:
        advance(harness)
    request.draft = right(request, 2)
    harness.scheduler._gpus[0].running.remove(request)
    harness.scheduler._preempt(request)
    assert request.draft == ()
