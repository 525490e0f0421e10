"""Requests that share blocks of equal first tokens have the tokens that each would have alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.plan.roofline import StepRecord
from hsrpc.testing.ordered_device import OrderedDevice
from tests.engine.conftest import tightest
from tests.engine.reference import NEW_TOKENS, Reference
from tests.engine.test_equivalence import config_for

NUM_PROMPTS = 5
LEADS = (0, 3, 17)
"""Tokens of each output that come before a continuation of it."""


async def continue_one(engine: Engine, prompt: list[int], count: int, **options: str) -> tuple[list[int], int]:
    """So many tokens behind a prompt, and how many of its own were found."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    tokens: list[int] = []
    async for delta in engine.generate(prompt, params, **options):
        tokens += delta.token_ids
        cached = delta.finish.usage.cached_tokens if delta.finish else 0
    return tokens, cached


async def continue_all(engine: Engine, reference: Reference) -> int:
    """Continue each prompt, and it with the first tokens of its output, all at once; how many tokens were found."""
    prompts = [
        (prompt + output[:lead], output[lead:])
        for prompt, output in list(zip(reference.prompts, reference.outputs, strict=True))[:NUM_PROMPTS]
        for lead in LEADS
    ]
    answers = await asyncio.gather(*(continue_one(engine, prompt, len(rest)) for prompt, rest in prompts))
    assert [tokens for tokens, _ in answers] == [rest for _, rest in prompts]
    assert engine.integrity() == {}
    found = sum(cached for _, cached in answers)
    assert all(cached < len(prompt) for (prompt, _), (_, cached) in zip(prompts, answers, strict=True))
    return found


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("opt", {"cache_policy": "kv"}),
        ("opt", {"cache_policy": "activation"}),
        ("opt", {"cache_policy": "hybrid", "activation_share": 0.5}),
        ("opt", {"recompute_share": 0.6, "expected_context": 90}),
        ("llama-gqa-tied", {"cache_policy": "hybrid", "activation_share": 0.5}),
        ("mistral-window", {"cache_policy": "hybrid", "activation_share": 0.5}),
        ("deepseek-v2", {"latent_attention": "absorb"}),
        ("deepseek-v2", {"latent_attention": "rebuild"}),
        ("qwen3-moe", {}),
    ],
)
async def test_tokens_equal_the_reference(
    model: str, settings: dict[str, object], reference: Callable[[str], Reference]
) -> None:
    """With hardly any room to keep blocks: requests are preempted, and find some of their own again."""
    made = reference(model)
    config = tightest(config_for(made, block_size=4, **settings))
    async with Engine(config) as engine:
        found = await continue_all(engine, made)
        assert engine.stats().cached_tokens == found > 0
        assert engine.stats().preemptions + engine.stats().recomputed_tokens > 0 or model == "mistral-window"


@pytest.mark.parametrize("here", [True, False])
async def test_accesses_to_shared_blocks_are_in_order(
    here: bool, reference: Callable[[str], Reference], ordered: list[OrderedDevice]
) -> None:
    """A block is read by those that found it behind the store of the one that computed it."""
    made = reference("opt")
    config = config_for(made, block_size=4, gpu_memory="1GiB" if here else None, max_batch=4)
    async with Engine(config if here else tightest(config)) as engine:
        assert await continue_all(engine, made) > 0
    assert ordered


async def first_and_again(engine: Engine, reference: Reference, first: str, again: str) -> int:
    """How many tokens of a prompt are found that was asked with one salt, when it is asked with another."""
    prompt = reference.prompts[0] * 3
    before, cached = await continue_one(engine, prompt, 4, cache_salt=first)
    assert cached == 0
    after, cached = await continue_one(engine, prompt, 4, cache_salt=again)
    assert before == after
    return cached


@pytest.fixture
def roomy(reference: Callable[[str], Reference]) -> EngineConfig:
    return config_for(reference("opt"), block_size=4, gpu_memory="64MiB", host_memory="64MiB")


@pytest.mark.parametrize("policy", ["kv", "activation"])
async def test_what_is_shared_crosses_once(policy: str, reference: Callable[[str], Reference]) -> None:
    """Six requests of 20 equal tokens and more that differ, in one mini-batch, all on the host."""
    made, moved = reference("opt"), []
    config = config_for(
        made, block_size=4, cache_policy=policy, placement="host", gpu_memory="1GiB", host_memory="1GiB"
    )
    for count in (1, 6):
        steps: list[StepRecord] = []
        async with Engine(config, observe=steps.append) as engine:
            prompts = [[*(made.prompts[0] * 9)[:20], 3 + number] for number in range(count)]
            await asyncio.gather(*(continue_one(engine, prompt, 5) for prompt in prompts))
        step = next(each for each in steps if each.decode_tokens == count and not each.prefill_tokens)
        rows = step.context_tokens - 20 * (count - 1)
        moved.append((step.cache_bytes / rows, step.regenerated_tokens / rows))
    assert moved[0] == moved[1]
    assert moved[0][0] > 0
    assert (moved[0][1] > 0) == (policy == "activation")


async def test_salts_keep_prompts_apart(roomy: EngineConfig, reference: Callable[[str], Reference]) -> None:
    for first, again, is_found in (("a", "b", False), ("c", "", False), ("d", "d", True)):
        async with Engine(roomy) as engine:
            assert (await first_and_again(engine, reference("opt"), first, again) > 0) == is_found


async def test_nothing_is_kept_where_nothing_is_to_be(
    roomy: EngineConfig, reference: Callable[[str], Reference]
) -> None:
    async with Engine(replace(roomy, prefix_cache=False)) as engine:
        assert await first_and_again(engine, reference("opt"), "", "") == 0
        assert engine.stats().cached_tokens == 0


async def test_a_conversation_finds_its_last_answer(roomy: EngineConfig, reference: Callable[[str], Reference]) -> None:
    made = reference("opt")
    prompt, output = made.prompts[0], made.outputs[0]
    async with Engine(roomy) as engine:
        assert await continue_one(engine, prompt, NEW_TOKENS) == (output, 0)
        whole = prompt + output
        _, cached = await continue_one(engine, [*whole, 5, 6, 7], 2)
        assert cached == (len(whole) - 1) // 4 * 4  # its last token was sampled, and is in no block


async def test_those_that_come_at_once_are_computed_once(
    roomy: EngineConfig, reference: Callable[[str], Reference]
) -> None:
    """The first computes what they share, in several chunks, and the others wait for it."""
    made, steps = reference("opt"), []
    prefix = (made.prompts[0] * 9)[:80]
    async with Engine(replace(roomy, max_prefill_tokens=16), observe=steps.append) as engine:
        prompts = [[*prefix, 3 + number] for number in range(6)]
        answers = await asyncio.gather(*(continue_one(engine, prompt, 3) for prompt in prompts))
        assert sorted(cached for _, cached in answers) == [0, *[80] * 5]
    assert sum(step.prefill_tokens for step in steps) == 80  # and the last of each, as those that decode
