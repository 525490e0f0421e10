"""Tokens of several GPUs equal those of one, and of transformers: what requests get does not depend on where they run.

The ranks are processes on the CPU, connected by gloo; what differs on GPUs is who copies the bytes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import pytest_asyncio

from hsrpc import Engine, SamplingParams
from hsrpc.constraint import Regex
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine import loading_progress
from hsrpc.engine.stats import EngineStats
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.roofline import StepRecord
from hsrpc.plan.sizes import ALIGNMENT
from tests.engine.gpus.support import GREEDY, ask_with_settings, assert_same, config_for, plan_where, planned
from tests.engine.reference import Reference
from tests.engine.support import collect, idle, ids, until
from tests.engine.test_ordering import quantised

NUM_PROMPTS = 8
SHORT = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
WITH_EXPERTS = "qwen3-moe"
"""All of which stream; it has blocks for all."""


async def generate_all(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    async def one(prompt: list[int]) -> list[int]:
        return [token async for delta in engine.generate(prompt, GREEDY) for token in delta.token_ids]

    return await asyncio.gather(*map(one, prompts))


def expected(made: Reference) -> list[list[int]]:
    return [output[: GREEDY.max_tokens] for output in made.outputs[:NUM_PROMPTS]]


@pytest.mark.parametrize(
    ("model", "gpus", "settings"),
    [
        ("opt", 2, {"cache_policy": "activation", "host_memory": "650KiB"}),
        ("llama-gqa-tied", 3, {"cache_policy": "kv", "host_memory": "700KiB"}),
        ("opt", 2, {"cache_policy": "auto", "host_memory": "900KiB"}),
        (WITH_EXPERTS, 2, {"cache_policy": "auto", "recompute_share": 0.5, "expected_context": 60}),
    ],
)
async def test_tokens_equal_the_reference(
    model: str,
    gpus: int,
    settings: dict[str, object],
    reference: Callable[[str], Reference],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights stream in parts, requests give way or keep no cache, others come and go; each layer's bytes cross one bus
    in a step."""
    made, steps = reference(model), list[StepRecord]()
    config = config_for(made, gpus, **settings)
    monkeypatch.setattr(loading_progress, "_LINE_SECONDS", 0.0)
    caplog.set_level("INFO", "hsrpc.engine.loading_progress")
    async with Engine(config, choose_plan=planned, observe=steps.append) as engine, asyncio.timeout(60):
        first = asyncio.create_task(generate_all(engine, made.prompts[:4]))
        await until(lambda: steps)
        leaver = await engine.submit(made.prompts[5], GREEDY)
        await anext(leaver)
        leaver.close()
        others = await generate_all(engine, made.prompts[4:NUM_PROMPTS])
        assert await first + others == expected(made)
        await idle(engine)
        stats, weights = engine.stats(), sum(engine.plan.streamed_bytes)
        padding = gpus * ALIGNMENT * engine.spec.sizes.num_layers
        check_each(engine, stats, padding)
        layers = engine.spec.sizes.num_layers
    assert re.fullmatch(rf"GPU [0-9]: loading weights: {layers} of {layers} layers", caplog.messages[-1])
    assert weights * stats.steps <= stats.weights_streamed_bytes <= (weights + padding) * (stats.steps + 1)
    assert max(step.num_requests for step in steps) > -(-config.max_batch // gpus)
    assert stats.preemptions > 0 or model == WITH_EXPERTS
    assert (stats.recomputed_tokens > 0) == ("recompute_share" in settings)


@pytest.mark.parametrize(
    ("gpus", "model", "settings"),
    [
        (2, "opt", {"host_memory": "650KiB", "gpu_memory": "1MiB"}),
        (3, "opt", {"weight_coding": "lossless", "dtype": "bfloat16"}),
        (2, WITH_EXPERTS, {}),
    ],
    ids=["few blocks", "coded", "quantised"],
)
async def test_tokens_where_weights_are_spread(
    gpus: int, model: str, settings: dict[str, object], reference: Callable[[str], Reference]
) -> None:
    """One of four layers streams, one is spread, one stays, one does all of that: tokens are as if all streamed on one.

    One after the other, since products of other shapes are rounded in other ways.
    """
    made = reference(model) if settings else quantised(reference(model))
    found = []
    for count, choose_plan in ((1, planned), (gpus, partial(plan_where, gpus=gpus))):
        config = config_for(made, count, **settings)
        async with Engine(config, choose_plan=choose_plan) as engine, asyncio.timeout(60):
            found.append([ids(await collect(engine.generate(prompt, SHORT))) for prompt in made.prompts[:3]])
            await idle(engine)
            stats, plan = engine.stats(), engine.plan
    assert found[1] == found[0]
    on_hosts = gpus * plan.host_bytes[HostUse.STREAMED_WEIGHTS]
    assert 0 < stats.weights_streamed_bytes <= on_hosts * (stats.steps + 1)
    assert plan.device_bytes[DeviceUse.SPREAD_WEIGHTS] > 0


def check_each(engine: Engine, stats: EngineStats, padding: int) -> None:
    """Every GPU loads an equal part of the weights, some tokens' blocks, and is not busy for longer than steps take."""
    assert len(stats.gpus) == len(engine.gpus) == engine.plan.num_gpus
    parts = [gpu.weights_streamed_bytes for gpu in stats.gpus]
    assert 0 < max(parts) - padding <= min(parts)
    assert all(gpu.cache_loaded_bytes > 0 and sum(gpu.peak_blocks.values()) > 0 for gpu in stats.gpus)
    assert all(gpu.busy_seconds > 0 for gpu in stats.gpus)
    assert [facts.machine.name for facts in engine.gpus] == ["CPU"] * engine.plan.num_gpus


@pytest.fixture(scope="module")
def opt(reference: Callable[[str], Reference]) -> Reference:
    return reference("opt")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(opt: Reference) -> AsyncIterator[Engine]:
    """An engine for the tests that follow: what it has served changes nothing of what comes behind."""
    async with Engine(config_for(opt, 2), choose_plan=planned) as engine:
        yield engine


@pytest.mark.asyncio(loop_scope="module")
async def test_settings_reach_the_rank_that_samples(two: Engine, opt: Reference) -> None:
    """Seeds, penalties, log-probabilities, of prompts too, and constraints, whose matchers stay with the front process,
    are as with one GPU."""
    async with Engine(config_for(opt, 1), choose_plan=planned) as one, asyncio.timeout(60):
        assert_same(await ask_with_settings(two, opt), await ask_with_settings(one, opt))


@pytest.mark.asyncio(loop_scope="module")
async def test_one_request_alone(two: Engine, opt: Reference) -> None:
    """All GPUs load and gather for the one that computes; no step is waited for in vain."""
    await idle(two)
    before = two.stats()
    async with asyncio.timeout(60):
        assert await generate_all(two, opt.prompts[:1]) == expected(opt)[:1]
        await idle(two)
    after, weights = two.stats(), sum(two.plan.streamed_bytes)
    steps, moved = after.steps - before.steps, after.weights_streamed_bytes - before.weights_streamed_bytes
    assert steps == GREEDY.max_tokens + len(opt.prompts[0]) // two.plan.max_idle_prefill_tokens
    assert (steps - 1) * weights <= moved <= (steps + 1) * (weights + 2 * ALIGNMENT * two.spec.sizes.num_layers)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prefix_is_found_where_it_is(two: Engine, opt: Reference) -> None:
    """Those that begin alike share blocks of their GPU, others are on another; what is found is as if computed."""
    prompts = sorted(opt.prompts, key=len)[-2:]
    wanted = [opt.outputs[opt.prompts.index(prompt)][: GREEDY.max_tokens] for prompt in prompts]
    async with asyncio.timeout(60):
        assert await generate_all(two, prompts) == wanted
        cached = two.stats().cached_tokens
        assert await generate_all(two, prompts) == wanted
        await idle(two)
    whole_blocks = sum((len(prompt) - 1) // two.plan.block_size for prompt in prompts)
    assert two.stats().cached_tokens == cached + whole_blocks * two.plan.block_size


@pytest.mark.asyncio(loop_scope="module")
async def test_a_step_that_all_have_left(two: Engine, opt: Reference) -> None:
    """It is swept to its end on all GPUs, and the next request finds everything as it was."""
    async with asyncio.timeout(60):
        leaving = [await two.submit(prompt, GREEDY) for prompt in opt.prompts[:4]]
        for each in leaving:
            await anext(each)
        for each in leaving:
            each.close()
        await idle(two)
        assert await generate_all(two, opt.prompts[4:5]) == expected(opt)[4:5]
        await idle(two)


async def test_drafts_reach_the_rank_that_verifies_them(reference: Callable[[str], Reference]) -> None:
    """Outputs are the reference's, and a constraint holds behind drafted tokens too."""
    made = reference("opt")
    outputs = dict(zip(map(tuple, made.prompts), made.outputs, strict=True))
    matching = SamplingParams(temperature=0.0, max_tokens=12, constraint=Regex("[ab]{3}(c|d)+"))
    found = []
    for gpus, drafts in ((1, 0), (2, 5)):
        config = config_for(made, gpus, max_draft_tokens=drafts)
        drafter = ReplayDrafter(outputs, 0.9)
        async with Engine(config, choose_plan=planned, drafter=drafter) as engine, asyncio.timeout(60):
            assert await generate_all(engine, made.prompts[:NUM_PROMPTS]) == expected(made)
            before = engine.stats()
            found.append(ids(await collect(engine.generate(made.prompts[NUM_PROMPTS], matching))))
            stats = engine.stats()
            await idle(engine)
        outputs[tuple(made.prompts[NUM_PROMPTS])] = found[0]
    assert 0 < before.accepted_tokens < before.drafted_tokens
    assert stats.accepted_tokens > before.accepted_tokens
    assert found[0] == found[1]
