"""Outputs that must match: whatever the model, the policy and the settings, they do, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from random import Random

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import BUNDLED_MODEL
from hsrpc.constraint import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.engine.grammars import grammars, matcher
from hsrpc.engine.grammars.grammars import Grammars
from hsrpc.errors import InvalidRequestError
from hsrpc.request import Delta, FinishReason
from hsrpc.schedule.step import SamplingRow
from tests.engine.reference import NEW_TOKENS, Reference
from tests.engine.support import collect, config_for, greedy, idle, ids, text, tight, until, weights_on_device

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
PERSON = {
    **COMPACT,
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "of": {"enum": ["fox", "owl", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "of", "tags"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", "no, never", '"quoted"\n', "größer", "狐")
NESTED = 'start: "x" | "(" start ")" | "[" start start "]"'


def is_person(found: str) -> bool:
    person = json.loads(found)
    assert list(person) == ["name", "age", "of", "tags"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 150
    assert person["of"] in ("fox", "owl", None)
    assert all(isinstance(tag, bool) for tag in person["tags"])
    return len(person["tags"]) <= 3


def is_nested(found: str) -> bool:
    while (shorter := re.sub(r"\(x\)|\[xx\]", "x", found)) != found:
        found = shorter
    return found == "x"


PHONE = r"\+[0-9]{2}( [0-9]{1,4}){1,5}|none"
CASES: tuple[tuple[Constraint, Callable[[str], object]], ...] = (
    (JsonSchema(PERSON), is_person),
    (Regex(PHONE), lambda found: re.fullmatch(PHONE, found)),
    (Choice(CHOICES), CHOICES.__contains__),
    (Grammar(NESTED), is_nested),
)
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "seed": 6, "top_k": 20, "ignore_eos": True},
    {"temperature": 0.7, "seed": 7, "top_p": 0.8, "min_tokens": 6, "logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 1.0, "repetition_penalty": 1.3, "min_tokens": 50, "ignore_eos": True},
    {"temperature": 1.0, "seed": 8, "logit_bias": {3: 20.0, 40: -50.0, 299: 100.0}, "presence_penalty": 0.5},
)


def asked(constraint: Constraint, **settings: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 60, "constraint": constraint} | settings))


def on_device(made: Reference) -> EngineConfig:
    """Steps are launched ahead of the tokens before them."""
    return config_for(made, gpu_memory="1GiB", host_memory="1GiB", cache_policy="kv", activation_share=None)


POLICIES = {
    "preempted": tight,
    "recomputed": lambda made: tight(made, cache_policy="recompute", activation_share=None),
    "resident": on_device,
    "bus": lambda made: weights_on_device(made, cache_policy="kv", activation_share=None),
}


MIXED = [(*CASES[number % len(CASES)], settings) for number, settings in enumerate(SETTINGS * 2)]
"""Each constraint with half of the settings."""


async def outputs(engine: Engine, made: Reference) -> list[list[Delta]]:
    """All of them at once, each behind a prompt of the reference's, and some that are not constrained."""
    asks = [
        collect(engine.generate(made.prompts[number % 8], asked(constraint, **settings)))
        for number, (constraint, _, settings) in enumerate(MIXED)
    ]
    free = [collect(engine.generate(prompt, greedy(NEW_TOKENS))) for prompt in made.prompts[:4]]
    found = await asyncio.gather(*free, *asks)
    assert [ids(deltas) for deltas in found[:4]] == made.outputs[:4]
    return found[4:]


@pytest.mark.parametrize(("model", "names"), [("opt", ("preempted", "recomputed")), ("llama", ("resident", "bus"))])
async def test_outputs_match_under_every_policy(
    model: str, names: Sequence[str], reference: Callable[[str], Reference]
) -> None:
    """Greedy and seeded, with every setting, also where requests give way and are computed again; and the tokens are
    the same under each policy. Requests beside them that are not constrained get their own."""
    made, first = reference(model), None
    for name in names:
        async with Engine(POLICIES[name](made)) as engine, asyncio.timeout(120):
            found = await outputs(engine, made)
            assert name != "preempted" or engine.stats().preemptions
            await idle(engine)
        first = first or found
        assert [ids(deltas) for deltas in found] == [ids(deltas) for deltas in first], name
    num_ended = 0
    for deltas, (_, check, _) in zip(first, MIXED, strict=True):
        assert max(ids(deltas)) < 259  # no row of padding
        assert deltas[-1].finish is not None
        if deltas[-1].finish.reason is FinishReason.EOS:
            num_ended += 1
            assert ids(deltas)[-1] == 2
            assert check(text(deltas)), text(deltas)
        else:
            assert deltas[-1].finish.reason is FinishReason.MAX_TOKENS
    assert num_ended >= len(MIXED) / 2


@pytest.fixture(scope="module")
def story() -> EngineConfig:
    """The bundled model, whose outputs are text."""
    return EngineConfig(model=BUNDLED_MODEL, device="cpu", dtype="float32", host_memory="64MiB", max_model_len=256)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "top_k": 40}])
async def test_what_excludes_nothing_changes_nothing(story: EngineConfig, settings: dict[str, object]) -> None:
    """Tokens, text, logprobs and end are those of a run without the constraint, whose output satisfies it."""
    params = SamplingParams(**settings, max_tokens=80, logprobs=3)
    async with Engine(story) as engine, asyncio.timeout(60):
        free = await collect(engine.generate("Once upon a time", params))
        for constraint in (Regex("(?s).*"), Grammar("start: /(?s:.*)/"), Regex(re.escape(text(free)) + "(?s).*")):
            found = await collect(engine.generate("Once upon a time", replace(params, constraint=constraint)))
            assert ids(found) == ids(free)
            assert text(found) == text(free)
            assert found[-1].finish is not None
            assert free[-1].finish is not None
            assert found[-1].finish.reason is free[-1].finish.reason
            assert [each.logprobs for each in found] == [each.logprobs for each in free]  # of the model's own logits


async def test_stops_come_before_the_end_of_a_constraint(story: EngineConfig) -> None:
    """A stop string and `max_tokens` leave the output incomplete, and say so."""
    schema = JsonSchema(COMPACT | {"type": "array", "items": {"const": "fox"}, "minItems": 9, "maxItems": 9})
    async with Engine(story) as engine, asyncio.timeout(60):
        whole = await collect(engine.generate("Hi", asked(schema)))
        stopped = await collect(engine.generate("Hi", asked(schema, stop=['"fox","fox"'])))
        cut = await collect(engine.generate("Hi", asked(schema, max_tokens=5)))
    assert json.loads(text(whole)) == ["fox"] * 9
    assert (text(stopped), stopped[-1].finish.reason) == ("[", FinishReason.STOP_STRING)
    assert (len(ids(cut)), cut[-1].finish.reason) == (5, FinishReason.MAX_TOKENS)
    assert text(whole).startswith(text(cut))


async def test_cancels_at_any_moment_leave_nothing(reference: Callable[[str], Reference]) -> None:
    """Requests that are left while their constraint is compiled, while they wait, and while they run."""
    made, random = reference("opt"), Random(7)
    async with Engine(tight(made)) as engine, asyncio.timeout(120):

        async def one(number: int) -> None:
            await asyncio.sleep(random.random() * 0.5)
            constraint = random.choice([*(each for each, _ in CASES), Regex(f"[a-z]{{1,{number}}}x")])
            params = asked(constraint, max_tokens=60, temperature=1.0)
            async with aclosing(engine.generate(made.prompts[number % 8][:40], params)) as stream:
                async for _ in stream:
                    if random.random() < 0.1:
                        break

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number)) for number in range(60)]
            for task in random.sample(tasks, 30):
                asyncio.get_running_loop().call_later(random.random() * 0.7, task.cancel)
        await idle(engine)
        process = engine._opened.grammars._trial._process
        assert process.poll() is None
    await until(lambda: process.poll() is not None)
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("hsrpc-")])


BAD: tuple[tuple[Constraint, str], ...] = (
    (Regex("("), "regex: unclosed group"),
    (JsonSchema({"properties": {"a": {"type": "text"}}}), "json_schema: at /properties/a: Invalid type: text"),
    (Grammar("start: x"), "grammar: line 1, column 8"),
    (Grammar('start: start "a"'), "grammar: no output can begin to satisfy it"),
)


async def test_what_cannot_be_compiled_is_refused(story: EngineConfig) -> None:
    """Nothing is left of such a request."""
    async with Engine(story) as engine, asyncio.timeout(60):
        for constraint, words in BAD:
            with pytest.raises(InvalidRequestError, match=re.escape(words)):
                await collect(engine.generate("Hi", asked(constraint)))
        assert not engine.integrity()


async def test_what_grows_beyond_its_bounds_ends_its_request_alone(story: EngineConfig) -> None:
    """With what is wrong; the other goes on, and so does the next with the same constraint."""
    hostile = Regex("((a{1000}){1000}){1000}")
    async with Engine(story) as engine, asyncio.timeout(60):
        other = asyncio.create_task(collect(engine.generate("Hi", greedy(60))))
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=r"regex: cannot be followed beyond token \d+ of the output"):
                await collect(engine.generate("Hi", asked(hostile)))
        assert len(ids(await other)) == 60
        assert engine.failed_in_a_row == 0
        await idle(engine)


async def test_bounds_that_requests_share_are_not_the_end_of_one(
    story: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where many requests of one constraint have come to its bounds together, each goes on with bounds of its own."""
    began_again = []
    begin_again = matcher.Matcher.begin_again

    def counted(each: matcher.Matcher) -> bool:
        began_again.append(each)
        return begin_again(each)

    async with Engine(story) as engine, asyncio.timeout(60):
        constraint = Regex("(a|b|[c-z ]{1,500}x){1,500}")
        whole = await collect(engine.generate("Hi", asked(constraint, temperature=1.0, seed=1)))
        compiled = engine._opened.grammars._cache.get(constraint)
        params = asked(constraint, temperature=1.0, seed=1)
        stream = engine.generate("Hi", params)
        found = [await anext(stream) for _ in range(5)]
        monkeypatch.setattr(matcher.Matcher, "begin_again", counted)
        while compiled.original.compute_bitmask() and not compiled.original.is_error():  # another uses the bounds up
            compiled.original.deep_copy().consume_tokens(exhausting(compiled))
        found += await collect(stream)
        again = await collect(engine.generate("Hi", params))
        await idle(engine)
    assert ids(found) == ids(whole) == ids(again)
    assert len(began_again) == 1


def exhausting(compiled: matcher.Compiled) -> list[int]:
    """Tokens of ever another text, which make the constraint's states."""
    random, copy, taken = Random(len(TRIED)), compiled.original.deep_copy(), []
    TRIED.append(None)
    while not copy.is_error() and len(taken) < 2000:
        mask = int.from_bytes(copy.compute_bitmask(), "little")
        allowed = [token_id for token_id in range(compiled.vocabulary.vocab_size) if mask >> token_id & 1]
        if not allowed:
            break
        taken.append(random.choice(allowed))
        copy.consume_token(taken[-1])
    return taken


TRIED: list[None] = []


async def test_constraints_are_compiled_once(story: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they are among those used last."""
    monkeypatch.setattr(grammars, "_MAX_CACHED", 2)
    made = []
    compile_ = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, each: made.append(each.text) or compile_(self, each))
    async with Engine(story) as engine, asyncio.timeout(60):
        for pattern in ("a", "b", "a", "c", "a", "b"):
            await collect(engine.generate("Hi", asked(Regex(pattern))))
    assert made == ["a", "b", "c", "b"]


async def test_masks_are_made_beside_the_event_loop(story: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of their own makes them, for all requests of a step together, before the step is sampled."""
    calls: list[tuple[str, int]] = []
    fill = Grammars._fill

    def noted(self: Grammars, matchers: list[object]) -> object:
        calls.append((threading.current_thread().name, len(matchers)))
        return fill(self, matchers)

    monkeypatch.setattr(Grammars, "_fill", noted)
    async with Engine(story) as engine, asyncio.timeout(60):
        await asyncio.gather(*(collect(engine.generate("Hi", asked(Regex("[a-z]{9}")))) for _ in range(4)))
    assert {name for name, _ in calls} == {"hsrpc-masks_0"}
    assert max(count for _, count in calls) == 4


async def test_without_a_tokenizer_nothing_can_be_constrained() -> None:
    """And the request is told so."""
    config = EngineConfig(model="random:opt-125m", device="cpu", host_memory="2GiB", max_model_len=64)
    async with Engine(config) as engine, asyncio.timeout(60):
        with pytest.raises(InvalidRequestError, match="json_object: this model has no tokenizer"):
            await collect(engine.generate([5], asked(JsonObject())))


def test_rows_tell_what_they_may_not_have() -> None:
    """End tokens of a constrained output that goes on past them, besides those until `min_tokens`."""

    class Anything:
        failure = None

        def push(self, token_id: int) -> None: ...

        def allowed(self, num_drafted: int = 0) -> None: ...

        def matched(self, draft: object) -> None: ...

    eos = frozenset({2})
    on = SamplingRow(SamplingParams(ignore_eos=True), 1, 5, 0, eos)
    assert (on.excluded_ids, on.has_edits) == (frozenset(), False)
    constrained = on._replace(matcher=Anything())
    assert (constrained.excluded_ids, constrained.has_edits) == (eos, True)
    assert constrained._replace(params=SamplingParams()).excluded_ids == frozenset()
    assert constrained._replace(params=SamplingParams(min_tokens=9, stop_token_ids=[7])).excluded_ids == {2, 7}
