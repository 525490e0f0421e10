"""What a consumer gets: the text, where it ends and why, and the facts of the last delta."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from hsrpc import Engine
from hsrpc.request import Delta, Finish, FinishReason, SamplingParams, TokenLogprob
from hsrpc.schedule.sweep import OpKind
from tests.engine.reference import Reference
from tests.engine.support import before, collect, greedy, idle, ids, roomy, text, tight, until

EOS = 2
LETTERS = "abc"


@pytest_asyncio.fixture
async def engine(reference: Callable[[str], Reference]) -> AsyncIterator[Engine]:
    async with Engine(roomy(reference("opt"), max_batch=4)) as made:
        yield made


async def letters(engine: Engine, **settings: Any) -> SamplingParams:
    """Settings with which the output is a fixed random text of the letters a, b and c, one token each."""
    bias = dict.fromkeys(await engine.tokenizer.encode(LETTERS), 100.0)
    return SamplingParams(**({"temperature": 2.0, "seed": 3, "max_tokens": 40, "logit_bias": bias} | settings))


async def run(engine: Engine, params: SamplingParams, prompt: Any = "prompt") -> tuple[str, list[int], Finish]:
    """Text, ids and finish, after checking what holds for every output."""
    deltas = await collect(engine.generate(prompt, params))
    assert [delta.finish is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    finish = deltas[-1].finish
    assert finish is not None
    assert finish.usage.completion_tokens == len(ids(deltas))
    assert finish.usage.prompt_tokens == len(prompt)
    await idle(engine)
    return text(deltas), ids(deltas), finish


async def test_deltas_are_the_text(engine: Engine) -> None:
    """Concatenated they are what the tokenizer makes of the ids; the end is MAX_TOKENS."""
    found, token_ids, finish = await run(engine, await letters(engine))
    assert found == await engine.tokenizer.decode(token_ids)
    assert set(found) == set(LETTERS)
    assert len(token_ids) == 40
    assert finish.reason is FinishReason.MAX_TOKENS
    assert finish.matched_stop is None


async def test_characters_of_several_tokens_come_whole(engine: Engine) -> None:
    """No half of a character is sent: the text is the same as if it were decoded at once."""
    bias = dict.fromkeys(await engine.tokenizer.encode("é"), 100.0)
    found, token_ids, _ = await run(engine, await letters(engine, logit_bias=bias))
    assert "é" in found
    assert found == await engine.tokenizer.decode(token_ids)


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_across_tokens_ends_the_text(engine: Engine, include_stop: bool) -> None:
    """The text ends before it, or with it; no piece of it was sent before."""
    whole, _, _ = await run(engine, await letters(engine))
    stop = whole[11:14]
    cut = whole.index(stop)
    found, token_ids, finish = await run(engine, await letters(engine, stop=["zzz", stop], include_stop=include_stop))
    assert found == whole[: cut + 3 if include_stop else cut]
    assert len(token_ids) == cut + 3
    assert finish.reason is FinishReason.STOP_STRING
    assert finish.matched_stop == stop


async def test_what_might_become_a_stop_string_is_sent_at_the_end(engine: Engine) -> None:
    """Held back text is not lost when the output ends otherwise."""
    whole, _, _ = await run(engine, await letters(engine))
    found, _, finish = await run(engine, await letters(engine, stop=[whole[-3:] + "z"]))
    assert found == whole
    assert finish.reason is FinishReason.MAX_TOKENS


async def test_after_a_stop_string_the_request_is_not_computed_any_more(engine: Engine) -> None:
    """No more than the steps that were under way while its text was matched."""
    whole, _, _ = await run(engine, await letters(engine))
    before = engine.stats().generated_tokens
    _, token_ids, _ = await run(engine, await letters(engine, stop=[whole[:3]], max_tokens=100))
    assert len(token_ids) == 3
    assert engine.stats().generated_tokens - before < 50


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_token_ends_the_text(engine: Engine, include_stop: bool) -> None:
    """Its id is in the output; its text only where that is asked for."""
    whole, token_ids, _ = await run(engine, await letters(engine))
    stop = token_ids[next(i for i, token_id in enumerate(token_ids) if token_id != token_ids[0])]
    cut = token_ids.index(stop)
    params = await letters(engine, stop_token_ids=[stop], include_stop=include_stop)
    found, stopped_ids, finish = await run(engine, params)
    assert stopped_ids == token_ids[: cut + 1]
    assert found == whole[: cut + include_stop]
    assert finish.reason is FinishReason.STOP_TOKEN
    assert finish.matched_stop == stop


async def test_end_of_text_token(engine: Engine) -> None:
    """It ends the output without text; `min_tokens` excludes it so long, `ignore_eos` goes past it."""
    prefer = {EOS: 100.0}
    found, token_ids, finish = await run(engine, await letters(engine, logit_bias=prefer))
    assert (found, token_ids, finish.reason) == ("", [EOS], FinishReason.EOS)
    _, token_ids, finish = await run(engine, await letters(engine, logit_bias=prefer, min_tokens=5))
    assert len(token_ids) == 6
    assert EOS not in token_ids[:5]
    assert (token_ids[-1], finish.reason) == (EOS, FinishReason.EOS)
    _, token_ids, finish = await run(engine, await letters(engine, logit_bias=prefer, ignore_eos=True, max_tokens=4))
    assert (token_ids, finish.reason) == ([EOS] * 4, FinishReason.MAX_TOKENS)


async def test_the_context_ends_the_output(engine: Engine) -> None:
    """Without max_tokens, or with more than there is room for: CONTEXT_LENGTH; with just as many: MAX_TOKENS."""
    prompt, room = [5] * 100, engine.max_model_len - 100
    reasons = {None: FinishReason.CONTEXT_LENGTH, room + 1: FinishReason.CONTEXT_LENGTH, room: FinishReason.MAX_TOKENS}
    for max_tokens, reason in reasons.items():
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        _, token_ids, finish = await run(engine, params, prompt)
        assert len(token_ids) == room
        assert finish.reason is reason
    generation = await engine.submit(prompt, SamplingParams())
    assert generation.params.max_tokens == room
    assert generation.params.seed is not None
    generation.close()


async def test_the_time_limit_ends_running_and_queued_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends with what there is: some tokens, or none; an ended request leaves no timer behind."""
    before(engine, monkeypatch, {OpKind.ATTEND}, lambda _: time.sleep(0.005))
    blockers = [await engine.submit([5] * 3, greedy(120)) for _ in range(3)]
    running = await engine.submit([5] * 3, greedy(120, time_limit=0.5))
    await until(lambda: engine.stats().running == 4)
    queued = await engine.submit([5] * 3, greedy(120, time_limit=0.05))
    ended = await collect(queued)
    assert (ids(ended), ended[-1].finish.reason) == ([], FinishReason.TIME_LIMIT)
    assert ended[-1].finish.timings.queue >= 0.05
    ended = await collect(running)
    assert 0 < len(ids(ended)) < 120
    assert ended[-1].finish.reason is FinishReason.TIME_LIMIT
    for generation in blockers:
        generation.close()
    await idle(engine)


async def test_the_timer_of_an_ended_request_is_cancelled(engine: Engine) -> None:
    """A day's limit does not keep a request in memory for a day."""
    for leave_early in (False, True):
        generation = await engine.submit([5], greedy(2, time_limit=86_400.0))
        timer = engine._delivery.live[generation.request_id].timer
        if leave_early:
            generation.close()
        else:
            await collect(generation)
        assert timer.cancelled()


async def test_timings_follow_each_other(engine: Engine) -> None:
    """No part is negative, and together they are the request's life."""
    start = time.monotonic()
    deltas = await collect(engine.generate([5] * 60, greedy(10)))
    life = time.monotonic() - start
    timings = deltas[-1].finish.timings
    assert min(timings.queue, timings.prefill, timings.decode) >= 0
    assert timings.first_token == pytest.approx(timings.queue + timings.prefill)
    assert timings.prefill > 0
    assert timings.first_token + timings.decode <= life


@pytest.mark.parametrize("top", [0, 3])
async def test_logprobs_come_with_their_tokens(engine: Engine, top: int) -> None:
    """One for each token, with as many alternatives as were asked for; a greedy token ranks first."""
    deltas = await collect(engine.generate([5, 6], greedy(8, logprobs=top)))
    for delta in deltas:
        assert [logprob.token_id for logprob in delta.logprobs] == list(delta.token_ids)
        for logprob in delta.logprobs:
            check_logprob(logprob, top)
    assert sum(len(delta.logprobs) for delta in deltas) == 8


def check_logprob(logprob: TokenLogprob, top: int) -> None:
    assert logprob.logprob <= 0
    assert logprob.rank == 1
    assert len(logprob.top) == top
    assert [value for _, value in logprob.top] == sorted((value for _, value in logprob.top), reverse=True)
    assert not top or logprob.top[0] == (logprob.token_id, pytest.approx(logprob.logprob))


async def test_no_logprobs_unless_asked_for(engine: Engine) -> None:
    """None in any delta."""
    assert all(delta.logprobs == () for delta in await collect(engine.generate([5, 6], greedy(4))))


async def test_a_slow_consumer_gets_everything_at_once(engine: Engine, reference: Callable[[str], Reference]) -> None:
    """What gathers while nobody takes it is merged into one delta, with the finish."""
    made = reference("opt")
    generation = await engine.submit(made.prompts[0], greedy(30))
    await idle(engine)
    deltas: list[Delta] = await collect(generation)
    assert len(deltas) == 1
    assert ids(deltas) == made.outputs[0][:30]
    assert deltas[0].finish.reason is FinishReason.MAX_TOKENS
    assert await collect(generation) == []


async def test_preemption_counts_in_the_usage(reference: Callable[[str], Reference]) -> None:
    """Requests that gave way say so, and nobody's tokens are counted twice."""
    made = reference("opt")
    async with Engine(tight(made)) as engine:
        results = await asyncio.gather(*(collect(engine.generate(p, greedy(64))) for p in made.prompts[:6]))
        usages = [deltas[-1].finish.usage for deltas in results]
        assert sum(usage.preemptions for usage in usages) == engine.stats().preemptions > 0
        assert {usage.completion_tokens for usage in usages} == {64}
