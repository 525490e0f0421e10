"""A generation between the engine and its consumer."""

from __future__ import annotations

import asyncio

import pytest

from hsrpc.core.request import Delta, Finish, FinishReason, SamplingParams, Timings, TokenLogprob, Usage
from hsrpc.engine.generation import Generation
from hsrpc.errors import EngineFaultError

END = Finish(FinishReason.EOS, Usage(1, 2), Timings(0.0, 0.0, 0.0, 0.0))


def make() -> tuple[Generation, list[str]]:
    """A generation, and the list in which its aborts are noted."""
    aborts: list[str] = []
    return Generation("a", [1, 2], SamplingParams(), lambda: aborts.append("a")), aborts


async def test_deltas_come_in_order_and_end_with_the_finish() -> None:
    """One put, one taken; after the finish the iteration ends, as often as it is asked."""
    generation, _ = make()
    generation.put(Delta("a", (1,)))
    assert await anext(generation) == Delta("a", (1,))
    generation.put(Delta("b", (2,), (), END))
    assert await anext(generation) == Delta("b", (2,), (), END)
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(generation)


async def test_what_is_not_taken_is_merged() -> None:
    """Text, ids and logprobs are joined in order; the finish is the last one's."""
    generation, _ = make()
    for index in range(50):
        logprob = TokenLogprob(index, -1.0, 1)
        generation.put(Delta(f"{index},", (index,), (logprob,), END if index == 49 else None))
    merged = await anext(generation)
    assert merged.text == "".join(f"{index}," for index in range(50))
    assert merged.token_ids == tuple(range(50))
    assert [logprob.token_id for logprob in merged.logprobs] == list(range(50))
    assert merged.finish is END


async def test_a_waiting_consumer_is_woken() -> None:
    """By output, by an error, and by a close from elsewhere."""
    for wake in ("put", "fail", "close"):
        generation, _ = make()
        waiting = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        {
            "put": lambda g: g.put(Delta("x")),
            "fail": lambda g: g.fail(EngineFaultError("died")),
            "close": Generation.close,
        }[wake](generation)
        (result,) = await asyncio.wait_for(asyncio.gather(waiting, return_exceptions=True), 5)
        assert isinstance(result, {"put": Delta, "fail": EngineFaultError, "close": StopAsyncIteration}[wake])


async def test_an_error_comes_after_the_output_and_once() -> None:
    """What was put before is not lost; then the error is raised, then the iteration is over."""
    generation, _ = make()
    generation.put(Delta("a"))
    generation.fail(EngineFaultError("died"))
    assert (await anext(generation)).text == "a"
    with pytest.raises(EngineFaultError, match="died"):
        await anext(generation)
    with pytest.raises(StopAsyncIteration):
        await anext(generation)


async def test_cancelling_a_wait_loses_nothing() -> None:
    """What arrives after, or together with, a cancelled wait is there for the next."""
    generation, _ = make()
    waiting = asyncio.create_task(anext(generation))
    await asyncio.sleep(0)
    generation.put(Delta("a", (1,)))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    generation.put(Delta("b", (2,)))
    assert await anext(generation) == Delta("ab", (1, 2))


async def test_closing_drops_what_was_not_taken() -> None:
    """After close the iteration is over, whatever was there or comes; each close aborts, which is harmless."""
    generation, aborts = make()
    generation.put(Delta("a"))
    generation.close()
    generation.put(Delta("b"))
    generation.close()
    assert aborts == ["a", "a"]
    with pytest.raises(StopAsyncIteration):
        await anext(generation)


async def test_two_consumers_share_one_generation() -> None:
    """Each delta goes to one of them; both end."""
    generation, _ = make()

    async def take() -> list[str]:
        return [delta.text async for delta in generation]

    tasks = [asyncio.create_task(take()) for _ in range(2)]
    for letter in "abc":
        await asyncio.sleep(0)
        generation.put(Delta(letter))
    await asyncio.sleep(0)
    generation.put(Delta("d", finish=END))
    texts = await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert sorted("".join(texts[0] + texts[1])) == list("abcd")
