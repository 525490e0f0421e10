"""A generation between the engine and its consumer."""

from __future__ import annotations

import asyncio

import pytest

from hsrpc.engine.generation import Generation
from hsrpc.errors import EngineFaultError
from hsrpc.request import Delta, Finish, FinishReason, SamplingParams, Timings, TokenLogprob, Usage

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


async def test_an_error_of_many_says_where_each_met_it() -> None:
    """The engine's fault is one for all its requests: its traceback does not grow with each that raises it."""
    fault, lengths = EngineFaultError("died"), []
    for _ in range(3):
        generation, _ = make()
        generation.fail(fault)
        with pytest.raises(EngineFaultError) as caught:
            await anext(generation)
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1


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


async def test_gathering_waits_for_enough() -> None:
    """One token of two does not end it; the second does, and both are taken at once."""
    generation, _ = make()
    gathering = asyncio.create_task(generation.gather(60, 2))
    generation.put(Delta("a", (1,)))
    await asyncio.sleep(0.01)
    assert not gathering.done()
    generation.put(Delta("b", (2,)))
    await asyncio.wait_for(gathering, 5)
    assert await anext(generation) == Delta("ab", (1, 2))


async def test_gathering_ends_in_time() -> None:
    """What has come within the time is there then, and a token that comes later wakes the consumer as ever."""
    generation, _ = make()
    await asyncio.wait_for(generation.gather(0.01, None), 5)
    waiting = asyncio.create_task(anext(generation))
    await asyncio.sleep(0)
    generation.put(Delta("a", (1,)))
    assert await asyncio.wait_for(waiting, 5) == Delta("a", (1,))


async def test_gathering_ends_with_output_that_comes_late_enough() -> None:
    """From the soonest time on the next output ends it; before that none does, though what there is goes in the end."""
    generation, _ = make()
    gathering = asyncio.create_task(generation.gather(60, None, 0.0))
    await asyncio.sleep(0.01)
    assert not gathering.done()
    generation.put(Delta("a", (1,)))
    await asyncio.wait_for(gathering, 5)
    assert await anext(generation) == Delta("a", (1,))
    gathering = asyncio.create_task(generation.gather(0.05, None, 60))
    await asyncio.sleep(0)
    generation.put(Delta("b", (2,)))
    await asyncio.sleep(0)
    assert not gathering.done()
    await asyncio.wait_for(gathering, 5)
    assert await anext(generation) == Delta("b", (2,))


@pytest.mark.parametrize("first", [True, False], ids=["before", "while"])
async def test_gathering_ends_with_the_output(first: bool) -> None:
    """A finish, an error and a close end it, whether they come before or while it waits."""
    ends = (lambda g: g.put(Delta(finish=END)), lambda g: g.fail(EngineFaultError("died")), Generation.close)
    for end in ends:
        generation, _ = make()
        if first:
            end(generation)
        gathering = asyncio.create_task(generation.gather(60, None))
        await asyncio.sleep(0)
        if not first:
            end(generation)
        await asyncio.wait_for(gathering, 5)


async def test_a_cancelled_gathering_loses_nothing() -> None:
    """What came while it waited is taken afterwards."""
    generation, _ = make()
    gathering = asyncio.create_task(generation.gather(60, None))
    await asyncio.sleep(0)
    generation.put(Delta("a", (1,)))
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert await asyncio.wait_for(anext(generation), 5) == Delta("a", (1,))
