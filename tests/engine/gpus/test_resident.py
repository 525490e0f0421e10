"""Two GPUs with all weights and caches on the devices: steps are launched ahead of their tokens, at each of them.

One engine for all tests: what it serves before changes nothing of what comes behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from hsrpc import Engine, SamplingParams
from hsrpc.engine.gpus.messages import Execute, Executed
from hsrpc.engine.gpus.ranks import RankProcess
from hsrpc.request import FinishReason
from tests.engine.gpus.support import ask_with_settings, assert_same, config_for, planned, ranks
from tests.engine.reference import NEW_TOKENS, Reference
from tests.engine.support import collect, greedy, idle, ids

pytestmark = pytest.mark.asyncio(loop_scope="module")
RESIDENT = {"placement": "auto", "gpu_memory": "64MiB", "cache_policy": "kv"}


@pytest.fixture(scope="module")
def made(reference: Callable[[str], Reference]) -> Reference:
    return reference("opt")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(made: Reference) -> AsyncIterator[Engine]:
    async with Engine(config_for(made, 2, max_batch=12, **RESIDENT), choose_plan=planned) as engine:
        assert ranks(engine).runs_ahead
        yield engine


@asynccontextmanager
async def watching() -> AsyncIterator[list[bool]]:
    """Each part of a step ahead says whether it gave tokens: a rank that was not ahead has none to continue with."""
    send, executed = RankProcess.send, RankProcess.executed
    ahead: dict[RankProcess, set[int]] = {}
    found: list[bool] = []

    def sent(rank: RankProcess, message: tuple[object, ...]) -> None:
        if isinstance(message, Execute) and message.ahead is not None and message.ahead.is_in_place:
            ahead.setdefault(rank, set()).add(message.ahead.step_id)
        send(rank, message)

    async def received(rank: RankProcess) -> Executed:
        result = await executed(rank)
        if result.step_id in ahead.get(rank, ()):
            found.append(result.result is not None)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankProcess, "send", sent)
        patch.setattr(RankProcess, "executed", received)
        yield found


async def test_tokens_equal_the_reference(engine: Engine, made: Reference) -> None:
    """Requests that come and go, on both GPUs; most steps run ahead, and each gives its tokens."""
    before = engine.stats().steps

    async def one(index: int, prompt: list[int]) -> list[int]:
        await asyncio.sleep(0.01 * index)
        return ids(await collect(engine.generate(prompt, greedy(NEW_TOKENS))))

    async with watching() as ahead, asyncio.timeout(60):
        outputs = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(made.prompts)))
        await idle(engine)
    assert outputs == made.outputs
    assert len(ahead) > engine.stats().steps - before  # of two parts a step
    assert all(ahead)
    assert engine.stats().weights_streamed_bytes == 0


async def test_requests_end_while_the_next_step_is_under_way(engine: Engine, made: Reference) -> None:
    """By a stop token, by their length on one GPU before the other, and by being aborted: neighbours go on."""
    stop = made.outputs[0][4]
    count = made.outputs[0].index(stop) + 1
    stopping = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=(stop,))
    async with watching() as ahead, asyncio.timeout(60):
        others = asyncio.gather(
            *(collect(engine.generate(made.prompts[i], greedy(NEW_TOKENS - 9 * i))) for i in range(1, 4))
        )
        stopped = asyncio.create_task(collect(engine.generate(made.prompts[0], stopping)))
        async for _ in engine.generate(made.prompts[4], greedy(100), request_id="aborted"):
            if engine.abort("aborted"):
                break
        found = await stopped
        for i, deltas in enumerate(await others, 1):
            assert ids(deltas) == made.outputs[i][: NEW_TOKENS - 9 * i]
        await idle(engine)
    assert ids(found) == made.outputs[0][:count]
    assert found[-1].finish is not None
    assert found[-1].finish.reason is FinishReason.STOP_TOKEN
    assert any(ahead)


async def test_settings_are_known_at_each_step(engine: Engine, made: Reference) -> None:
    """Penalties, seeds, masks and log-probabilities follow the tokens before, though steps are launched before them."""
    async with watching() as ahead, asyncio.timeout(60):
        found = await ask_with_settings(engine, made)
        await idle(engine)
    assert any(ahead)
    async with Engine(config_for(made, 1, **RESIDENT), choose_plan=planned) as alone:
        assert_same(found, await ask_with_settings(alone, made))
