"""Models on the device: steps are launched ahead of the tokens before them, and everything stays as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.engine.forward import Pass
from hsrpc.engine.graphs import DecodeGraphs
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.request import FinishReason
from hsrpc.schedule.step import MiniBatch, StopFlag
from tests.engine.reference import NEW_TOKENS, Reference
from tests.engine.support import before_sampling, collect, config_for, greedy, idle, ids, parts

pytestmark = pytest.mark.usefixtures("ordered")


def resident(made: Reference, **settings: object) -> EngineConfig:
    """Weights and cache all on the device, K and V only."""
    base = {"gpu_memory": "1GiB", "host_memory": "1GiB", "cache_policy": "kv", "activation_share": None}
    return config_for(made, **(base | settings))


@contextmanager
def counting() -> Iterator[list[MiniBatch]]:
    """The mini-batches that are launched before the tokens that they continue with are known."""
    run, found = DecodeGraphs.run, []

    def counted(graphs: DecodeGraphs, batch: MiniBatch, sampled: torch.Tensor | None, stop: StopFlag) -> Pass | None:
        found.extend([batch] if sampled is not None else [])
        return run(graphs, batch, sampled, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeGraphs, "run", counted)
        yield found


@pytest.mark.parametrize("model", ["opt", "llama", "mistral-window", "ministral", "qwen3-moe"])
async def test_tokens_equal_the_reference(model: str, reference: Callable[[str], Reference]) -> None:
    """Requests that come and go; most steps run ahead, whatever windows the layers have."""
    made = reference(model)
    async with Engine(resident(made)) as engine, asyncio.timeout(60):
        with counting() as ahead:

            async def one(index: int, prompt: list[int]) -> list[int]:
                await asyncio.sleep(0.01 * index)
                return ids(await collect(engine.generate(prompt, greedy(NEW_TOKENS))))

            outputs = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(made.prompts)))
        assert outputs == made.outputs
        assert len(ahead) > NEW_TOKENS // 2
        assert engine.stats().weights_streamed_bytes == 0
        await idle(engine)


async def test_a_stop_ends_a_request_though_its_next_step_is_under_way(reference: Callable[[str], Reference]) -> None:
    """The token behind the stop token is computed in vain and shown to nobody; its neighbour is not disturbed."""
    made = reference("opt")
    async with Engine(resident(made)) as engine, asyncio.timeout(60):
        stop = made.outputs[0][4]
        count = made.outputs[0].index(stop) + 1
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=(stop,))
        with counting() as ahead:
            stopped, whole = await asyncio.gather(
                collect(engine.generate(made.prompts[0], params)),
                collect(engine.generate(made.prompts[1], greedy(NEW_TOKENS))),
            )
        assert ids(stopped) == made.outputs[0][:count]
        assert stopped[-1].finish is not None
        assert stopped[-1].finish.reason is FinishReason.STOP_TOKEN
        assert ids(whole) == made.outputs[1]
        assert ahead
        await idle(engine)


async def test_sampling_settings_see_every_token(reference: Callable[[str], Reference]) -> None:
    """Penalties and seeds depend on the tokens before: the same text as with steps one by one."""
    made = reference("opt")
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.3, max_tokens=20, ignore_eos=True)
    texts = []
    for settings in ({}, {"placement": "host"}):
        async with Engine(resident(made, **settings)) as engine, asyncio.timeout(60):
            assert parts(engine).executor.runs_ahead == (not settings)
            texts.append(ids(await collect(engine.generate(made.prompts[0], params))))
            await idle(engine)
    assert texts[0] == texts[1]


async def test_aborting_while_steps_are_under_way(reference: Callable[[str], Reference]) -> None:
    """Blocks are back, and the neighbour's tokens are its own."""
    made = reference("opt")
    async with Engine(resident(made)) as engine, asyncio.timeout(60):
        neighbour = asyncio.create_task(collect(engine.generate(made.prompts[1], greedy(NEW_TOKENS))))
        async for _ in engine.generate(made.prompts[0], greedy(100), request_id="a"):
            if engine.abort("a"):
                break
        assert ids(await neighbour) == made.outputs[1]
        await idle(engine)


async def test_memory_running_out_ends_the_requests_and_no_more(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sampling of a step whose successor is scheduled already; the next request finds everything as it was."""
    made = reference("opt")
    async with Engine(resident(made)) as engine, asyncio.timeout(60):
        calls = 0

        def failing() -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise torch.OutOfMemoryError("no memory")

        before_sampling(monkeypatch, failing)
        with pytest.raises(OutOfDeviceMemoryError):
            await collect(engine.generate(made.prompts[0], greedy(NEW_TOKENS)))
        await idle(engine)
        assert ids(await collect(engine.generate(made.prompts[1], greedy(NEW_TOKENS)))) == made.outputs[1]
        await idle(engine)
