"""Greedy tokens equal those of transformers' `generate`: every family, policy, share, block size and budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.engine.stats import EngineStats
from hsrpc.schedule.blocks import BlockKind, PoolId
from tests.engine.conftest import tightest
from tests.engine.reference import FAMILIES, MODELS, NEW_TOKENS, Reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
POLICIES = [
    ("kv", None),
    ("activation", None),
    ("hybrid", 0.0),
    ("hybrid", 0.3),
    ("hybrid", 0.5),
    ("hybrid", 1.0),
    ("recompute", None),
    ("auto", None),
]


def config_for(reference: Reference, **settings: object) -> EngineConfig:
    """Prompts longer than a prefill chunk, and room for a third of what the requests grow to."""
    base = {"max_batch": 6, "max_model_len": 128, "max_prefill_tokens": 24, "expected_context": 24, "device": "cpu"}
    base["experts"] = "stream"  # on demand: tests/engine/test_demand.py
    config = EngineConfig(model=str(reference.directory), **(base | settings))
    return replace(config, min_batch=config.max_batch)


async def generate_all(engine: Engine, reference: Reference, *, stagger: float = 0.0) -> list[list[int]]:
    async def one(index: int, prompt: list[int]) -> list[int]:
        await asyncio.sleep(stagger * index)
        return [token async for delta in engine.generate(prompt, params) for token in delta.token_ids]

    params = replace(GREEDY, max_tokens=len(reference.outputs[0]))
    return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(reference.prompts)))


def part_of(made: Reference) -> Reference:
    """Fewer prompts and tokens, for what is tried with many models: enough that requests queue and give way."""
    return replace(made, prompts=made.prompts[:8], outputs=[output[:40] for output in made.outputs[:8]])


async def check(reference: Reference, config: EngineConfig, *, stagger: float = 0.0) -> EngineStats:
    async with Engine(config) as engine:
        assert await generate_all(engine, reference, stagger=stagger) == reference.outputs
        stats = engine.stats()
        assert sum(stats.used_blocks.values()) == 0
        return stats


IN_WINDOWS = ("mistral-window", "mixtral", "phi3-window", "starcoder2")
"""Models whose requests hold no more than a window: with these prompts and budgets hardly one gives way."""
WITH_EVERY_SHARE = ("opt", "llama-gqa-tied", "mistral-window", "qwen3-moe")
ONE_OF_EACH_POLICY = [(policy, share) for policy, share in POLICIES if share in (None, 0.5)]


@pytest.mark.parametrize(
    ("model", "policy", "share"),
    [(model, *each) for model in WITH_EVERY_SHARE for each in POLICIES]
    + [(model, *each) for model in MODELS | FAMILIES if model not in WITH_EVERY_SHARE for each in ONE_OF_EACH_POLICY],
)
async def test_tokens_equal_the_reference_with_tight_budgets(
    model: str, policy: str, share: float | None, reference: Callable[[str], Reference]
) -> None:
    """Weights stream, requests queue and are preempted, and every token is the reference's."""
    made = part_of(reference(model))
    config = tightest(config_for(made, cache_policy=policy, activation_share=share))
    stats = await check(made, config)
    assert stats.weights_streamed_bytes > 0
    if policy != "recompute":
        assert stats.preemptions > 0 or model in IN_WINDOWS
        assert stats.cache_loaded_bytes > 0


@pytest.mark.parametrize("settings", [{}, {"resident_share": 1.0}, {"recompute_share": 0.6, "expected_context": 90}])
@pytest.mark.parametrize("model", ["deepseek-v2", "deepseek-v3"])
async def test_tokens_do_not_depend_on_what_single_queries_attend_to(
    model: str, settings: dict[str, object], reference: Callable[[str], Reference]
) -> None:
    """Latents as they are stored, on the host and on the device, beside prompts that rebuild K and V of theirs."""
    made = part_of(reference(model))
    config = tightest(config_for(made, latent_attention="absorb", **settings))
    async with Engine(config) as engine:
        assert await generate_all(engine, made) == made.outputs
        assert engine.plan.absorbs
        assert engine.stats().cache_loaded_bytes > 0
        assert engine.stats().preemptions + engine.stats().recomputed_tokens > 0


@pytest.mark.parametrize("max_batch", [3, 16])
async def test_latents_on_the_device_are_attended_to_where_they_lie(
    max_batch: int, reference: Callable[[str], Reference]
) -> None:
    """Steps that only decode use no buffer and rebuild nothing; each is made while the one before is computed."""
    made, computed = reference("deepseek-v2"), []
    settings = {"gpu_memory": "1GiB", "max_batch": max_batch, "expected_context": 128}
    config = config_for(made, latent_attention="absorb", **settings)
    async with Engine(config, observe=computed.append) as engine:
        assert await generate_all(engine, made) == made.outputs
    decoding = [step for step in computed if not step.prefill_tokens]
    assert len(decoding) > 32
    assert all(step.regenerated_tokens == 0 and step.cache_bytes == 0 for step in decoding)


@pytest.mark.parametrize(("policy", "share"), [("kv", None), ("activation", None), ("hybrid", 0.5)])
@pytest.mark.parametrize("model", MODELS)
async def test_tokens_equal_the_reference_when_no_weights_stream(
    model: str, policy: str, share: float | None, reference: Callable[[str], Reference]
) -> None:
    """Weights on the device, most blocks on the host: these are loaded by the thread that computes."""
    made = part_of(reference(model))
    config = config_for(made, cache_policy=policy, activation_share=share, resident_share=1.0)
    stats = await check(made, tightest(config))
    assert stats.weights_streamed_bytes == 0
    assert stats.cache_loaded_bytes > 0
    assert stats.preemptions > 0 or model in IN_WINDOWS


@pytest.mark.parametrize(("policy", "share"), [("kv", None), ("activation", None), ("hybrid", 0.5)])
@pytest.mark.parametrize(
    ("model", "recompute"),
    [("opt", 0.3), ("opt", 0.6), ("opt", 1.0), ("llama-gqa-tied", 0.6), ("mistral-window", 0.6), ("qwen3-moe", 0.6)],
)
async def test_tokens_do_not_depend_on_who_keeps_a_cache(
    model: str, policy: str, share: float | None, recompute: float, reference: Callable[[str], Reference]
) -> None:
    """Some of the requests give up their blocks and are computed anew in each step, beside those that keep theirs."""
    made, computed = part_of(reference(model)), []
    config = config_for(made, cache_policy=policy, activation_share=share, recompute_share=recompute)
    async with Engine(tightest(replace(config, expected_context=90)), observe=computed.append) as engine:
        assert await generate_all(engine, made) == made.outputs
        assert engine.plan.recompute.tokens > 0
    assert sum(step.recomputed_tokens for step in computed) > 0


@pytest.mark.parametrize("placement", ["host", "auto"])
async def test_every_cached_activation_is_rebuilt_in_every_layer(
    placement: str, reference: Callable[[str], Reference]
) -> None:
    """From blocks on the host and on the device alike, and each is counted once."""
    made, computed = reference("opt"), []
    config = config_for(made, cache_policy="activation", placement=placement, gpu_memory="1GiB", host_memory="1GiB")
    async with Engine(config, observe=computed.append) as engine:
        assert await generate_all(engine, made) == made.outputs
        layers = engine.spec.sizes.num_layers
        assert (engine.stats().cache_loaded_bytes > 0) == (placement == "host")
    assert all(step.regenerated_tokens == step.context_tokens * layers for step in computed)
    assert sum(step.regenerated_tokens for step in computed) > 0


@pytest.mark.parametrize("policy", ["kv", "activation"])
@pytest.mark.parametrize(("model", "windows"), [("mistral-window", [24] * 4), ("ministral", [24, 128, 24, 128])])
async def test_each_layer_loads_and_rebuilds_what_its_window_shows(
    model: str, windows: list[int], policy: str, reference: Callable[[str], Reference]
) -> None:
    """To the token: of one request's cached tokens those that the first new one sees, in decode and in chunks."""
    made, computed = reference(model), []
    config = config_for(made, cache_policy=policy, activation_share=None, placement="host", gpu_memory="1GiB")
    async with Engine(replace(config, host_memory="1GiB"), observe=computed.append) as engine:
        for prompt, output in list(zip(made.prompts, made.outputs, strict=True))[:3]:
            assert [t async for delta in engine.generate(prompt, GREEDY) for t in delta.token_ids] == output
        row = engine.spec.sizes.layers[0].row(BlockKind(policy)).num_bytes
    seen = [sum(min(step.context_tokens, window - 1) for window in windows) for step in computed]
    assert max(step.context_tokens for step in computed) > 2 * 24
    assert [step.cache_bytes for step in computed] == [row * tokens for tokens in seen]
    assert [step.regenerated_tokens for step in computed] == [(policy == "activation") * tokens for tokens in seen]


def by_length(made: Reference, chosen: slice) -> Reference:
    """Some of the prompts, in order of length."""
    pairs = sorted(zip(made.prompts, made.outputs, strict=True), key=lambda pair: len(pair[0]))[chosen]
    return replace(made, prompts=[prompt for prompt, _ in pairs], outputs=[output for _, output in pairs])


LONGEST, SHORTEST = slice(-4, None), slice(6)


@pytest.mark.parametrize("model", ["mistral-window", "phi3-window"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_policy": "kv"},
        {"cache_policy": "activation"},
        {"cache_policy": "hybrid", "activation_share": 0.5, "max_batch": 2},
        {"cache_policy": "auto", "recompute_share": 0.4, "expected_context": 90, "max_batch": 2},
    ],
)
async def test_requests_are_longer_than_what_the_blocks_hold(
    settings: dict[str, object], model: str, reference: Callable[[str], Reference]
) -> None:
    """Blocks that the window has left go to the tokens to come, of prompts in chunks and of outputs."""
    made = by_length(reference(model), LONGEST)
    memory = {"placement": "host", "gpu_memory": "1GiB", "host_memory": "1GiB"}
    base = {"max_batch": 1, "max_prefill_tokens": 8, "block_size": 4}
    async with Engine(config_for(made, **(memory | base | settings))) as engine, asyncio.timeout(60):
        assert sum(engine.plan.num_blocks.values()) * 4 < len(made.prompts[-1]) + NEW_TOKENS
        assert await generate_all(engine, made) == made.outputs
        assert sum(engine.stats().used_blocks.values()) == 0


@pytest.mark.parametrize("policy", ["kv", "activation"])
async def test_requests_that_gave_way_are_computed_anew_behind_their_windows(
    policy: str, reference: Callable[[str], Reference]
) -> None:
    """Short prompts come in together and outgrow the blocks; their tokens are computed again from the first on."""
    made = by_length(reference("mistral-window"), SHORTEST)
    settings = {"cache_policy": policy, "expected_context": 1, "max_prefill_tokens": 8, "block_size": 4}
    stats = await check(made, tightest(config_for(made, **settings)))
    assert stats.preemptions > 0


@pytest.mark.usefixtures("ordered")
async def test_steps_ahead_use_the_blocks_that_windows_leave(reference: Callable[[str], Reference]) -> None:
    """All on the device, which has no more blocks than windows show: nobody gives way, and no block is elsewhere."""
    made = by_length(reference("mistral-window"), LONGEST)
    settings = {"cache_policy": "kv", "gpu_memory": "1GiB", "max_batch": 3, "block_size": 4, "max_prefill_tokens": 8}
    async with Engine(config_for(made, **settings)) as engine, asyncio.timeout(60):
        num_blocks = engine.plan.num_blocks
        assert sum(num_blocks.values()) == num_blocks[PoolId.DEVICE_KV] < 3 * 10
        assert await generate_all(engine, made) == made.outputs
        assert engine.stats().preemptions == 0


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", ["opt", "llama", "mistral-window", "ministral"])
async def test_tokens_do_not_depend_on_the_block_size(
    model: str, share: float, block_size: int, reference: Callable[[str], Reference]
) -> None:
    """Blocks of one token, and of more than a prompt, give the same tokens."""
    made = part_of(reference(model))
    config = config_for(made, cache_policy="hybrid", activation_share=share, block_size=block_size)
    await check(made, tightest(config))


@pytest.mark.parametrize("model", ["opt", "llama-gqa-tied", "mistral-window", "qwen2-window"])
async def test_tokens_equal_the_reference_when_all_is_resident(
    model: str, reference: Callable[[str], Reference]
) -> None:
    """With room for everything, nothing streams and the tokens are the same."""
    made = reference(model)
    stats = await check(made, config_for(made, gpu_memory="1GiB", max_batch=16, expected_context=128))
    assert stats.weights_streamed_bytes == 0
    assert stats.preemptions == 0


async def test_requests_join_and_leave_while_others_run(reference: Callable[[str], Reference]) -> None:
    """Requests that arrive while others run, and others that are cancelled mid-way, change nobody's tokens."""
    made = reference("opt")
    config = tightest(config_for(made, cache_policy="hybrid", activation_share=0.5))
    async with Engine(config) as engine:
        leavers = [await engine.submit(prompt, replace(GREEDY, max_tokens=60)) for prompt in made.prompts[:6]]
        joiners = asyncio.create_task(generate_all(engine, made, stagger=0.02))
        for leaver in leavers:
            await anext(leaver)
            leaver.close()
        assert await joiners == made.outputs
        assert engine.stats().used_blocks == dict.fromkeys(engine.stats().used_blocks, 0)


async def test_mini_batches_do_not_change_tokens(reference: Callable[[str], Reference]) -> None:
    """A step that needs several mini-batches a layer gives the same tokens."""
    made = reference("opt")
    config = config_for(made, cache_policy="hybrid", activation_share=0.5, max_batch=16, expected_context=100)
    async with Engine(replace(tightest(config), host_memory="64MiB")) as engine:
        assert engine.plan.buffers.rows < 16 * 100
        assert await generate_all(engine, made) == made.outputs
