"""Drafts change no token: whatever is drafted, outputs are those of an engine that drafts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.constraint import Regex
from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine.stats import EngineStats
from hsrpc.request import FinishReason, Usage
from hsrpc.schedule import assemble, packing
from hsrpc.schedule.step import Chunk, MiniBatch
from hsrpc.testing.ordered_device import OrderedDevice
from tests.engine.conftest import tightest
from tests.engine.reference import NEW_TOKENS, VOCAB, Reference
from tests.engine.support import collect, greedy, idle, ids, roomy, text, tight, until
from tests.engine.test_ahead import counting, resident
from tests.engine.test_demand import graphs_run
from tests.engine.test_equivalence import IN_WINDOWS, config_for, generate_all

NUM_PROMPTS = 9


DRAFTS = {"max_draft_tokens": 15}
"""Room for drafts."""


class Hostile:
    """Drafts that are wrong in any way, or in none."""

    def __init__(self, reference: Reference, seed: int = 0) -> None:
        self._right = replay(reference)
        self._random = Random(seed)
        self.asked: set[str] = set()
        self.forgotten: list[str] = []

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        assert wanted
        self.asked |= {each.request_id for each in wanted}
        return [self._spoil(draft, each) for draft, each in zip(self._right.draft(wanted), wanted, strict=True)]

    def forget(self, request_ids: Collection[str]) -> None:
        self.forgotten += request_ids
        self._right.forget(request_ids)

    def _spoil(self, draft: Sequence[int], wanted: Wanted) -> Sequence[int]:
        assert 1 <= wanted.max_tokens <= 15
        assert wanted.token_ids[wanted.num_prompt_tokens :]
        anything = [self._random.randrange(VOCAB) for _ in range(wanted.max_tokens)]
        cut = self._random.randrange(wanted.max_tokens + 1)
        return self._random.choice(
            [
                draft,
                [*draft[:cut], *anything],
                [*draft, *anything, *anything],
                [],
                [-1, *draft],
                [*draft[:cut], VOCAB, *draft[cut:]],
                [*draft[:cut], 2**70, -(2**70)],
            ]
        )


def replay(reference: Reference, acceptance: float = 1.0) -> ReplayDrafter:
    outputs = zip(map(tuple, reference.prompts), reference.outputs, strict=True)
    return ReplayDrafter(dict(outputs), acceptance)


def first(made: Reference, count: int) -> Reference:
    """The reference with fewer prompts."""
    return replace(made, prompts=made.prompts[:count], outputs=made.outputs[:count])


async def check(made: Reference, config: EngineConfig, drafter: Drafter) -> EngineStats:
    """Every token is the reference's, and nothing is held at the end."""
    async with Engine(config, drafter=drafter) as engine:
        assert await generate_all(engine, made) == made.outputs
        await idle(engine)
        return engine.stats()


@pytest.mark.parametrize(
    ("model", "settings", "drafters"),
    [
        ("opt", {"cache_policy": "kv", "block_size": 4, "expected_context": 4}, "right wrong hostile"),
        ("opt", {"cache_policy": "activation"}, "hostile"),
        ("opt", {"cache_policy": "hybrid", "activation_share": 0.5}, "right hostile"),
        ("opt", {"cache_policy": "recompute"}, "hostile"),
        ("opt", {"recompute_share": 0.6, "expected_context": 90}, "hostile"),
        ("llama-gqa-tied", {"cache_policy": "auto"}, "hostile"),
        ("mistral-window", {"cache_policy": "hybrid", "activation_share": 0.5, "block_size": 4}, "hostile"),
        ("deepseek-v2", {"latent_attention": "absorb"}, "hostile"),
        ("deepseek-v2", {"latent_attention": "rebuild"}, "hostile"),
        ("qwen3-moe", {"experts": "stream"}, "hostile"),
        ("qwen3-moe", {"experts": "demand"}, "hostile"),
    ],
)
async def test_tokens_equal_the_reference_with_tight_budgets(
    model: str, settings: dict[str, object], drafters: str, reference: Callable[[str], Reference]
) -> None:
    """Under every policy, with requests that queue and are preempted."""
    made = first(reference(model), NUM_PROMPTS)
    config = tightest(config_for(made, **DRAFTS, **settings))
    of_each = {"right": replay(made), "wrong": replay(made, 0.5), "hostile": Hostile(made)}
    for drafter in map(of_each.__getitem__, drafters.split()):
        stats = await check(made, config, drafter)
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        assert stats.generated_tokens == NEW_TOKENS * len(made.prompts)
        assert stats.preemptions > 0 or settings.get("block_size") != 4 or model in IN_WINDOWS


async def test_accesses_of_steps_with_drafts_are_in_order(
    reference: Callable[[str], Reference], ordered: list[OrderedDevice]
) -> None:
    """Blocks that rejected tokens were stored to are another's with the next step."""
    made = first(reference("opt"), 6)
    settings = {"cache_policy": "hybrid", "activation_share": 0.5, "block_size": 4, "max_batch": 3}
    await check(made, tightest(config_for(made, **DRAFTS, **settings)), Hostile(made))
    assert ordered


class Answer(NamedTuple):
    """What a consumer gets, beside log-probabilities as numbers."""

    text: str
    token_ids: list[int]
    reason: FinishReason
    matched: str | int | None
    num_tokens: int
    logprobs: list[tuple[int, int]]
    prompt_logprobs: list[int]


def sampled(**settings: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 5, "temperature": 4.0, "max_tokens": 40, "ignore_eos": True} | settings))


LETTERS = dict.fromkeys(range(68, 74), 100.0)
"""Nothing but a few letters, and what has as much."""
ASKED = {
    "greedy": greedy(40),
    "seed": sampled(),
    "few": sampled(top_k=4, min_p=0.05),
    "most": sampled(top_p=0.8, temperature=0.7),
    "penalties": sampled(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logit_bias=LETTERS),
    "bias": sampled(logit_bias=LETTERS),
    "stop": sampled(logit_bias=LETTERS, stop=["dgg", "bc"]),
    "kept stop": sampled(logit_bias=LETTERS, stop=["fgf", "dc"], include_stop=True, seed=6),
    "stop token": sampled(logit_bias=LETTERS, stop_token_ids=[70], min_tokens=9),
    "end": sampled(logit_bias=LETTERS | {2: 100.0}, ignore_eos=False, min_tokens=5),
    "logprobs": sampled(logprobs=3, prompt_logprobs=1),
    "constraint": sampled(constraint=Regex("([a-f]{2}[0-9]{3}){2,5}(end)?"), ignore_eos=False),
    "greedy constraint": greedy(40, constraint=Regex("([a-f]{2}[0-9]{3}){2,5}(end)?")),
    "to the context": sampled(max_tokens=None, seed=8),
}
PROMPT = [*range(40, 60), *range(90, 99)]


async def answers(config: EngineConfig, drafter: Drafter | None) -> tuple[dict[str, Answer], dict[str, Usage]]:
    """What is answered to each of `ASKED`, all at once; and what it took."""

    async def one(engine: Engine, name: str, params: SamplingParams) -> tuple[Answer, Usage]:
        prompt = [*PROMPT, 100 + list(ASKED).index(name)]
        deltas = await collect(engine.generate(prompt, params, request_id=name))
        [finish] = [delta.finish for delta in deltas if delta.finish is not None]
        logprobs = [(each.token_id, each.rank) for delta in deltas for each in delta.logprobs]
        scored = [each.token_id for delta in deltas for each in delta.prompt_logprobs]
        count = finish.usage.completion_tokens
        answer = Answer(text(deltas), ids(deltas), finish.reason, finish.matched_stop, count, logprobs, scored)
        return answer, finish.usage

    async with Engine(config, drafter=drafter) as engine:
        found = await asyncio.gather(*(one(engine, name, params) for name, params in ASKED.items()))
        await idle(engine)
    names = dict(zip(ASKED, found, strict=True))
    return {name: answer for name, (answer, _) in names.items()}, {name: usage for name, (_, usage) in names.items()}


@pytest.mark.parametrize("budget", [tight, roomy])
async def test_answers_are_those_without_drafts(
    budget: Callable[..., EngineConfig], reference: Callable[[str], Reference]
) -> None:
    """Whatever a request asks for, and wherever in a draft it ends; prompts share their first blocks."""
    config = budget(reference("opt"), block_size=4, max_batch=4, **DRAFTS)
    wanted, _ = await answers(config, None)
    assert {answer.reason for answer in wanted.values()} == {
        *(FinishReason.EOS, FinishReason.STOP_STRING, FinishReason.STOP_TOKEN),
        *(FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LENGTH),
    }
    known = {
        (*PROMPT, 100 + number): [*answer.token_ids, *[65] * 20]  # and more behind the end
        for number, answer in enumerate(wanted.values())
    }
    for acceptance in (1.0, 0.7):
        found, usage = await answers(config, ReplayDrafter(known, acceptance))
        assert found == wanted
        assert all(0 < each.accepted_tokens <= each.drafted_tokens for each in usage.values())


async def test_whoever_leaves_takes_nothing_along(reference: Callable[[str], Reference]) -> None:
    """Requests come and go; the others have their tokens, and the drafter forgets all that it was asked about."""
    made, random = reference("opt"), Random(3)
    drafter = Hostile(made)

    async def one(engine: Engine, number: int) -> None:
        await asyncio.sleep(random.random())
        prompt, output = made.prompts[number % len(made.prompts)], made.outputs[number % len(made.prompts)]
        leaves_at = random.choice((0, 1, 9, 40, 99, 99))
        tokens: list[int] = []
        deltas = engine.generate(prompt, greedy(NEW_TOKENS), request_id=str(number % 20))  # some ids are used again
        async with aclosing(deltas):
            async for delta in deltas:
                tokens += delta.token_ids
                if len(tokens) > leaves_at:
                    break
        assert tokens == output[: len(tokens)]
        assert len(tokens) >= min(leaves_at, NEW_TOKENS)

    async with Engine(tight(made, block_size=4, **DRAFTS), drafter=drafter) as engine, asyncio.timeout(120):
        for start in (0, 20):
            await asyncio.gather(*(one(engine, number) for number in range(start, start + 20)))
        await idle(engine)
        await until(lambda: set(drafter.forgotten) == drafter.asked)
        assert engine.stats().accepted_tokens > 0


class Broken(Hostile):
    """A drafter that works for some steps."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        drafts = super().draft(wanted)
        return drafts if len(self.asked) < 5 else self.break_down(drafts)

    def break_down(self, drafts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        raise RuntimeError("no more")


class Unequal(Broken):
    """A drafter that forgets some requests in its answer."""

    def break_down(self, drafts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return drafts[1:]


class NoNumbers(Broken):
    """A drafter that answers with texts."""

    def break_down(self, drafts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return ["abc"] * len(drafts)  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [Broken, Unequal, NoNumbers])
async def test_requests_go_on_without_a_drafter_that_fails(
    kind: type[Broken], reference: Callable[[str], Reference], caplog: pytest.LogCaptureFixture
) -> None:
    made = first(reference("opt"), 6)
    stats = await check(made, roomy(made, **DRAFTS), kind(made))
    assert stats.generated_tokens == 6 * NEW_TOKENS
    assert "the drafter failed: no more tokens are drafted" in caplog.text


class Seldom(Hostile):
    """A drafter that mostly has nothing to say."""

    calls = 0

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        self.calls += 1
        drafts = super().draft(wanted)
        return drafts if self.calls % 4 == 0 else [()] * len(drafts)


async def test_steps_run_ahead_while_nothing_is_drafted(
    reference: Callable[[str], Reference], ordered: list[OrderedDevice]
) -> None:
    """A model on the device: of its steps those without a draft are launched before their tokens are known."""
    made = first(reference("opt"), 6)
    for drafter, runs_ahead in ((Seldom(made), True), (replay(made), False)):
        with counting() as ahead:
            stats = await check(made, resident(made, **DRAFTS), drafter)
        assert stats.accepted_tokens > 0
        assert bool(ahead) == runs_ahead
    assert ordered


@pytest.mark.parametrize("model", ["opt", "mistral-window", "deepseek-v2"])
async def test_drafts_are_read_in_place(
    model: str, reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all blocks lie on the device, drafted tokens are single queries beside the others, in the same graphs."""
    made = first(reference(model), NUM_PROMPTS)
    drafted = []
    pack = packing.pack

    def spy(chunks: Sequence[Chunk], *given: object, **settings: object) -> MiniBatch:
        batch = pack(chunks, *given, **settings)
        if any(chunk.draft for chunk in chunks) and all(chunk.is_decode for chunk in chunks):
            drafted.append(batch.only_single_queries)
        return batch

    monkeypatch.setattr(assemble, "pack", spy)
    with graphs_run() as sizes:
        stats = await check(made, config_for(made, gpu_memory="1GiB", max_batch=4, max_draft_tokens=15), Hostile(made))
    assert max(sizes) > 4
    assert stats.accepted_tokens
    assert drafted
    assert all(drafted)
