"""Tokens of several GPUs equal those of one, and of transformers: what requests get does not depend on where they run.

The ranks are processes on the CPU, connected by gloo; what differs on GPUs is who copies the bytes.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from functools import partial

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.constraint import Regex
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine import loading_progress
from hsrpc.engine.stats import EngineStats
from hsrpc.errors import ConfigError
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.roofline import StepRecord
from hsrpc.plan.sizes import ALIGNMENT
from hsrpc.request import Delta
from tests.engine.gpus.support import GREEDY, config_for, plan_where, planned
from tests.engine.reference import Reference
from tests.engine.support import collect, idle, ids, text, until
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
        (WITH_EXPERTS, 2, {"cache_policy": "auto"}),
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
    """Weights stream in parts, requests give way, others come and go; each layer's bytes cross one bus in a step."""
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


async def test_settings_reach_the_rank_that_samples(reference: Callable[[str], Reference]) -> None:
    """Seeds, log-probabilities and constraints, whose matchers stay with the front process, are as with one GPU."""
    made = reference("opt")
    drawn = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    matching = SamplingParams(temperature=1.0, seed=5, max_tokens=12, constraint=Regex("[ab]{3}(c|d)+"))
    found = []
    for gpus in (1, 2):
        async with Engine(config_for(made, gpus), choose_plan=planned) as engine, asyncio.timeout(60):
            asked = [(prompt, params) for prompt in made.prompts[:3] for params in (drawn, matching)]
            found.append(await asyncio.gather(*(collect(engine.generate(*each)) for each in asked)))
    assert all(re.fullmatch("[ab]{3}[cd]+", text(each)) for each in found[1][1::2])
    for one, two in zip(*found, strict=True):
        assert ids(one) == ids(two)
        both = zip(logprobs(one), logprobs(two), strict=True)
        assert all(math.isclose(first, second, abs_tol=1e-4) for first, second in both)


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


def test_a_draft_model_is_for_one_gpu() -> None:
    with pytest.raises(ConfigError, match=r"gpus=2.*draft_model=small.*gpus=1"):
        EngineConfig(gpus=2, draft_model="small")


def logprobs(deltas: list[Delta]) -> list[float]:
    return [each.logprob for delta in deltas for each in (*delta.prompt_logprobs, *delta.logprobs)]
