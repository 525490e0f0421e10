"""Whom the queue takes, how fast it says no, and that no is free."""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from hsrpc import Engine, SamplingParams, Text
from hsrpc.engine.generation import Generation
from hsrpc.errors import (
    EngineUnavailableError,
    GaveWayError,
    InvalidRequestError,
    QueueFullError,
    WaitTooLongError,
)
from hsrpc.schedule.queue_rate import QueueRate
from tests.engine.reference import Reference
from tests.engine.support import collect, greedy, idle, ids, live, roomy, until


@asynccontextmanager
async def busy(made: Reference, **settings: object) -> AsyncIterator[tuple[Engine, Generation]]:
    """An engine whose only place is taken for long."""
    async with Engine(roomy(made, max_batch=1, **settings)) as engine:
        running = await engine.submit([5], greedy(120))
        await until(lambda: engine.stats().running == 1)
        yield engine, running
        running.close()
        await idle(engine)


def never_tokenise(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def encode(text: str) -> list[int]:
        pytest.fail("the prompt was tokenised")

    monkeypatch.setattr(engine.tokenizer, "encode", encode)


async def test_tokens_that_wait_are_bounded(reference: Callable[[str], Reference]) -> None:
    """With 50 tokens waiting of at most 60, 20 more are refused, 10 are taken; one alone may be larger."""
    async with busy(reference("opt"), max_queued_tokens=60) as (engine, _):
        large = await engine.submit([5] * 100, greedy(1))
        with pytest.raises(QueueFullError, match=r"100 prompt tokens wait already \(max_queued_tokens\)"):
            await engine.submit([5], greedy(1))
        large.close()
        held = [await engine.submit([5] * 50, greedy(1))]
        with pytest.raises(QueueFullError):
            await engine.submit([5] * 20, greedy(1))
        with pytest.raises(QueueFullError):
            await engine.submit("a text of more than ten tokens", greedy(1))
        held.append(await engine.submit([5] * 10, greedy(1)))
        with pytest.raises(QueueFullError):
            await engine.submit("one", greedy(1))
        for generation in held:
            generation.close()
        assert "waiting tokens" not in engine.integrity()


async def test_no_is_said_at_once_and_before_tokenising(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """With a full queue, a text is refused in microseconds, without a look at it."""
    async with busy(reference("opt"), max_queued_requests=1) as (engine, _):
        waiting = await engine.submit([5], greedy(1))
        never_tokenise(engine, monkeypatch)
        seconds = []
        for _ in range(50):
            start = time.perf_counter()
            with pytest.raises(QueueFullError):
                await engine.submit("a prompt " * 500, greedy(1))
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.005
        waiting.close()


async def test_prompts_that_are_tokenised_hold_their_place(reference: Callable[[str], Reference]) -> None:
    """Ten prompts come at once where two may wait: eight are refused before the tokenizer has seen them."""
    async with busy(reference("opt"), max_queued_requests=2) as (engine, _):
        results = await asyncio.gather(
            *(engine.submit("a prompt", greedy(1)) for _ in range(10)), return_exceptions=True
        )
        taken = [result for result in results if isinstance(result, Generation)]
        assert len(taken) == 2
        assert sum(isinstance(result, QueueFullError) for result in results) == 8
        for generation in taken:
            generation.close()
        for generation in [await engine.submit("a prompt", greedy(1)) for _ in range(2)]:  # there is room again
            generation.close()


def drained_slowly(patch: pytest.MonkeyPatch) -> None:
    """As if 100 requests of one token had been let in within the last 200 s, with somebody waiting all the time."""
    patch.setattr(QueueRate, "seconds_for", lambda _, num_tokens: 200.0 / 100.0 * num_tokens)


@pytest.mark.parametrize("limit", ["deadline", "time limit"])
async def test_a_hopeless_deadline_is_refused_at_once(
    limit: str, monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """50 tokens wait and 1 leaves every 2 s: who may wait 10 s is refused, who may wait 90 s, or for ever, is taken."""
    async with busy(reference("opt")) as (engine, _):
        held = [await engine.submit([5] * 50, greedy(1))]
        drained_slowly(monkeypatch)

        async def submit(seconds: float, priority: int = 0) -> Generation:
            settings: dict[str, float] = {"time_limit": seconds} if limit == "time limit" else {}
            params = greedy(1, priority=priority, **settings)
            return await engine.submit([5], params, max_wait=None if settings else seconds)

        with pytest.raises(WaitTooLongError) as caught:
            await submit(10.0)
        assert 1.0 <= caught.value.retry_after <= 60.0
        held += [await submit(90.0), await submit(10.0, priority=-1), await engine.submit([5], greedy(1))]
        for generation in held:
            generation.close()


async def test_an_empty_queue_refuses_no_deadline(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """Where nobody waits, nothing is predicted, however slow the queue was."""
    async with Engine(roomy(reference("opt"))) as engine:
        drained_slowly(monkeypatch)
        assert len(ids(await collect(await engine.submit([5], greedy(2), max_wait=0.001)))) == 2


async def test_a_light_client_passes_a_greedy_one(reference: Callable[[str], Reference]) -> None:
    """One request of a client comes before the thirty that another had queued earlier, and its tokens are its own."""
    made = reference("opt")
    async with busy(made) as (engine, running):
        greedy_ones = [await engine.submit([7] * 4, greedy(1), client="greedy") for _ in range(30)]
        light = await engine.submit(made.prompts[0], greedy(2), client="light")
        running.close()
        assert ids(await collect(light)) == made.outputs[0][:2]
        left = sum(live(engine, generation.request_id) is not None for generation in greedy_ones)
        assert left >= 25
        for generation in greedy_ones:
            generation.close()


async def attempt(engine: Engine, client: str, user: str = "", prompt: str | list[int] | None = None) -> Generation:
    return await engine.submit(prompt or [5], greedy(1), client=client, user=user)


async def outcomes(generations: list[Generation]) -> list[type | None]:
    """How each ended within the loop's next turns: the type of its error, or None where it has not ended."""
    tasks = [asyncio.ensure_future(collect(generation)) for generation in generations]
    await asyncio.wait(tasks, timeout=0)
    ended = [type(task.exception()) if task.done() else None for task in tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return ended


@pytest.mark.parametrize("names", ["one user", "a new user each time"])
async def test_a_full_queue_gives_way_to_a_light_client(names: str, reference: Callable[[str], Reference]) -> None:
    """With 16 places and 40 calls of one client, another's 8 are taken and its 9th is not; nobody is lost."""
    async with busy(reference("opt"), max_queued_requests=16) as (engine, running):
        users = ["" if names == "one user" else str(number) for number in range(40)]
        calls = [attempt(engine, "greedy", user) for user in users]
        heavy = [one for one in await asyncio.gather(*calls, return_exceptions=True) if isinstance(one, Generation)]
        assert len(heavy) == 16
        light = [await attempt(engine, "light") for _ in range(8)]
        assert engine.stats().queued == 16
        for client in ("light", "greedy"):
            with pytest.raises(QueueFullError):
                await attempt(engine, client)
        assert await outcomes(light) == [None] * 8
        ended = await outcomes(heavy)
        assert (ended.count(GaveWayError), ended.count(None)) == (8, 8)
        assert live(engine, running.request_id) is not None
        for generation in (*light, *heavy):
            generation.close()


async def test_users_of_one_client_give_way_to_each_other(reference: Callable[[str], Reference]) -> None:
    """Within a client's share the user with the longest line gives way, and not to himself."""
    async with busy(reference("opt"), max_queued_requests=4) as (engine, _):
        heavy = [await attempt(engine, "gateway", "heavy") for _ in range(4)]
        other = await attempt(engine, "gateway", "light")
        with pytest.raises(QueueFullError):
            await attempt(engine, "gateway", "heavy")
        assert await outcomes([*heavy, other]) == [None, None, None, GaveWayError, None]
        for generation in (*heavy, other):
            generation.close()


async def test_prompts_that_are_tokenised_give_way_too(reference: Callable[[str], Reference]) -> None:
    """Four prompts of one client hold all places while they are tokenised; two of another's are taken all the same."""
    async with busy(reference("opt"), max_queued_requests=4) as (engine, _):
        calls = [attempt(engine, client, prompt="a prompt") for client in ("greedy",) * 4 + ("light",) * 2]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [Generation] * 2 + [GaveWayError] * 2 + [Generation] * 2
        for result in results:
            if isinstance(result, Generation):
                result.close()


async def test_tokens_give_way_too(reference: Callable[[str], Reference]) -> None:
    """A line of 60 tokens gives way, from its end, to one of 25; one that would be as long takes nothing."""
    async with busy(reference("opt"), max_queued_tokens=60) as (engine, _):
        held = [await attempt(engine, "greedy", prompt=[5] * 20) for _ in range(3)]
        with pytest.raises(QueueFullError, match="60 prompt tokens wait already"):
            await attempt(engine, "other", prompt=[5] * 59)
        assert await outcomes(held) == [None] * 3
        light = await attempt(engine, "light", prompt=[5] * 25)
        assert await outcomes([*held, light]) == [None, GaveWayError, GaveWayError, None]
        for generation in (*held, light):
            generation.close()


@pytest.mark.parametrize(
    ("prompt", "field"), [("x" * 10_000_000, "text"), (range(10**12), "token_ids")], ids=["text", "ids"]
)
async def test_a_huge_prompt_costs_nothing(
    prompt: str | range, field: str, monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """What cannot fit is refused by its length: neither tokenised nor copied."""
    async with Engine(roomy(reference("opt"))) as engine:
        never_tokenise(engine, monkeypatch)
        tracemalloc.start()
        try:
            with pytest.raises(InvalidRequestError) as caught:
                await engine.submit(prompt, SamplingParams())
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()
        assert caught.value.field == field


async def test_huge_settings_cost_nothing(reference: Callable[[str], Reference]) -> None:
    """The largest max_tokens takes blocks for the tokens that there are, and no more."""
    async with Engine(roomy(reference("opt"))) as engine:
        generation = await engine.submit([5], SamplingParams(max_tokens=2**31 - 1, min_tokens=2**31 - 1))
        await anext(generation)
        assert sum(engine.stats().used_blocks.values()) <= 8
        generation.close()
        await idle(engine)


@pytest.mark.parametrize("field", ["text", "token_ids"])
async def test_what_cannot_fit_is_not_tokenised_either(field: str, reference: Callable[[str], Reference]) -> None:
    """A mere text is as long as a prompt may be, and ids are no more than a prompt and its output together."""
    async with Engine(roomy(reference("opt"))) as engine:
        length = engine.max_model_len * (64 if field == "text" else 1)

        async def ask(length: int) -> object:
            return await (engine.tokenize("x" * length) if field == "text" else engine.detokenize([5] * length))

        assert await ask(length)
        with pytest.raises(InvalidRequestError, match=rf"^{field}: {length + 1} .*; at most {length} .*fit") as caught:
            await ask(length + 1)
        assert caught.value.field == field


async def test_texts_that_wait_are_bounded(reference: Callable[[str], Reference]) -> None:
    """Whatever waits for the tokenizer has a place in the queue: beyond the last, texts, ids and prompts are refused,
    and who leaves gives the place back."""
    async with Engine(roomy(reference("opt"), max_queued_requests=2)) as engine:
        go_on = threading.Event()
        holding = asyncio.create_task(engine.tokenizer._short.run("other", go_on.wait, 20))
        waiting = [asyncio.create_task(work) for work in (engine.tokenize("abc"), engine.detokenize([5, 6]))]
        await asyncio.sleep(0)
        for refused in (engine.tokenize("abc"), engine.detokenize([5]), engine.submit("abc", greedy(1))):
            with pytest.raises(QueueFullError, match=r"2 requests wait already \(max_queued_requests\)"):
                await refused
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        again = asyncio.create_task(engine.tokenize("abc"))
        go_on.set()
        assert await again == await engine.tokenizer.encode("abc")
        assert await waiting[1] == await engine.tokenizer.decode([5, 6])
        assert await holding


async def test_an_engine_that_is_closed_takes_no_texts(reference: Callable[[str], Reference]) -> None:
    """As `submit` does, it says so."""
    async with Engine(roomy(reference("opt"))) as engine:
        pass
    for refused in (engine.tokenize("abc"), engine.detokenize([5])):
        with pytest.raises(EngineUnavailableError, match="not running"):
            await refused


async def test_prompts_take_turns_with_texts_of_other_clients(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """One client's texts and ids wait in its line, and another's prompt passes all but the first of them."""
    async with Engine(roomy(reference("opt"))) as engine:
        tokenizer, order = engine.tokenizer, []
        for name in ("_encode", "_decode"):
            made = getattr(tokenizer, name)
            monkeypatch.setattr(tokenizer, name, lambda *data, made=made: (order.append(data[0]), made(*data))[1])
        begun, go_on = threading.Event(), threading.Event()
        holding = asyncio.create_task(tokenizer._short.run("busy", lambda: (begun.set(), go_on.wait(20))))
        await asyncio.to_thread(begun.wait, 20)
        many = [
            asyncio.create_task(work)
            for work in (engine.tokenize("1", client="busy"), engine.detokenize([5, 6], client="busy"))
        ]
        await asyncio.sleep(0)
        prompt = asyncio.create_task(engine.submit("prompt", greedy(1), client="light"))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(holding, *many)
        (await prompt).close()
        assert order == [Text("1"), Text("prompt"), [5, 6]]
