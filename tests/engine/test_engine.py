"""The engine's contract: what it refuses, what it promises of order and seeds, and how it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hsrpc import Engine, EngineConfig
from hsrpc.engine import delivery as delivery_module
from hsrpc.engine import engine as engine_module
from hsrpc.engine.forward import Forward
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.tasks.executor import Executor
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.errors import (
    EngineFaultError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFiniteError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestExistsError,
    RequestFailedError,
)
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.scheduler import Scheduler
from hsrpc.schedule.sweep import OpKind
from tests.engine.reference import VOCAB, Reference
from tests.engine.support import (
    before,
    before_sampling,
    collect,
    edit_logits,
    greedy,
    idle,
    ids,
    live,
    parts,
    roomy,
    tight,
    until,
    weights_on_device,
)

SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=40, ignore_eos=True)


async def test_an_engine_serves_between_entering_and_leaving_only(reference: Callable[[str], Reference]) -> None:
    """Before, after and on a second entering: EngineUnavailableError, which says what to do."""
    engine = Engine(roomy(reference("opt")))
    for is_new in (True, False):
        with pytest.raises(EngineUnavailableError):
            await engine.submit([5], greedy(1))
        properties = (lambda: engine.plan, lambda: engine.tokenizer, lambda: engine.max_model_len)
        for look in (engine.stats, engine.heartbeat, *properties):
            with pytest.raises(EngineUnavailableError, match="async with"):
                look()
        assert not engine.abort("a")
        if is_new:
            with pytest.raises(EngineUnavailableError):
                await engine.wait_failed()
            async with engine:
                with pytest.raises(EngineUnavailableError, match="make another"):
                    await engine.__aenter__()
                assert len(ids(await collect(engine.generate([5], greedy(2))))) == 2
    with pytest.raises(EngineUnavailableError, match="make another"):
        await engine.__aenter__()


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        pytest.param([], "token_ids", "empty", id="empty"),
        pytest.param("", "text", "empty", id="empty-text"),
        pytest.param([5] * 128, "token_ids", "at most 127", id="too-long"),
        pytest.param("a" * 128, "text", "128 prompt tokens", id="too-long-text"),
        pytest.param([5, VOCAB], "token_ids[1]", f"use 0 to {VOCAB - 1}", id="outside"),
        pytest.param([5, 6, -1], "token_ids[2]", "-1 is no token id", id="negative"),
        pytest.param([True], "token_ids[0]", "True", id="bool"),
        pytest.param([5.0], "token_ids[0]", "5.0", id="float"),
        pytest.param(["5"], "token_ids[0]", "'5'", id="string"),
    ],
)
async def test_a_wrong_prompt_is_refused_and_allocates_nothing(
    prompt: Any, field: str, message: str, reference: Callable[[str], Reference]
) -> None:
    """The error names the field and the place in it; the engine is as it was."""
    async with Engine(roomy(reference("opt"))) as engine:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            await engine.submit(prompt, greedy(1))
        assert caught.value.field == field
        assert engine.integrity() == {}
        assert engine.stats().prompt_tokens == 0


@pytest.mark.parametrize("settings", [{"stop_token_ids": [3, VOCAB]}, {"logit_bias": {VOCAB: 1.0}}])
async def test_ids_outside_the_vocabulary_are_refused_in_settings(
    settings: dict[str, Any], reference: Callable[[str], Reference]
) -> None:
    """Stop tokens and logit bias must be the model's."""
    async with Engine(roomy(reference("opt"))) as engine:
        with pytest.raises(InvalidRequestError, match=f"{VOCAB} is no token id") as caught:
            await engine.submit([5], SamplingParams(**settings))
        assert caught.value.field.startswith(next(iter(settings)))


async def test_a_live_id_is_refused_and_a_full_queue_too(reference: Callable[[str], Reference]) -> None:
    """The requests that were there before go on; when one ends there is room again."""
    made = reference("opt")
    async with Engine(roomy(made, max_batch=1, max_queued_requests=2)) as engine:
        running = await engine.submit(made.prompts[0], greedy(30), request_id="a")
        with pytest.raises(RequestExistsError, match="'a'"):
            await engine.submit([5], greedy(1), request_id="a")
        await until(lambda: engine.stats().running == 1)
        queued = [await engine.submit(prompt, greedy(8)) for prompt in made.prompts[1:3]]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            await engine.submit([5], greedy(1))
        assert ids(await collect(running)) == made.outputs[0][:30]
        await until(lambda: engine.stats().queued < 2)
        again = await engine.submit(made.prompts[3], greedy(8), request_id="a")
        outputs = [ids(await collect(generation)) for generation in [*queued, again]]
        assert outputs == [output[:8] for output in made.outputs[1:4]]
        await idle(engine)


@pytest.mark.parametrize("asked", [None, 7, 2**31 - 1], ids=str)
async def test_settings_in_effect_are_those_that_model_and_context_allow(
    asked: int | None, reference: Callable[[str], Reference]
) -> None:
    """No count says more than the context or the vocabulary has; what ended the output is told as before."""
    async with Engine(roomy(reference("opt"))) as engine:
        room = engine.max_model_len - 3
        params = SamplingParams(max_tokens=asked, min_tokens=asked or room + 1, top_k=2**31 - 1, ignore_eos=True)
        generation = await engine.submit([5, 6, 7], params)
        in_effect = generation.params
        deltas = await collect(generation)
        max_tokens = min(asked or room, room)
        assert (in_effect.max_tokens, in_effect.min_tokens, in_effect.top_k) == (max_tokens, max_tokens, VOCAB)
        assert in_effect == replace(
            params, seed=in_effect.seed, max_tokens=max_tokens, min_tokens=max_tokens, top_k=VOCAB
        )
        assert len(ids(deltas)) == max_tokens
        finish = deltas[-1].finish
        assert finish is not None
        assert finish.reason is (FinishReason.MAX_TOKENS if asked == 7 else FinishReason.CONTEXT_LENGTH)
        again = await collect(engine.generate([5, 6, 7], in_effect))
        assert ids(again) == ids(deltas)


async def test_two_submissions_of_one_id_at_the_same_time(reference: Callable[[str], Reference]) -> None:
    """While the tokenizer works on both, neither is live; one of them wins."""
    async with Engine(roomy(reference("opt"))) as engine:
        results = await asyncio.gather(
            *(engine.submit("a prompt", greedy(2), request_id="a") for _ in range(3)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["Generation"] + ["RequestExistsError"] * 2


async def test_smaller_priority_runs_first(reference: Callable[[str], Reference]) -> None:
    """Those that wait are admitted by priority, and in order of arrival where it is the same."""
    async with Engine(roomy(reference("opt"), max_batch=1)) as engine:
        first = await engine.submit([5], greedy(10))
        await until(lambda: engine.stats().running == 1)
        priorities = [5, 0, -5, 0]
        waiting = [await engine.submit([6], greedy(2, priority=priority)) for priority in priorities]
        ended: list[int] = []

        async def note(index: int) -> None:
            await collect(waiting[index])
            ended.append(index)

        await asyncio.gather(collect(first), *(note(index) for index in range(4)))
        assert ended == [2, 1, 3, 0]


async def test_a_seed_gives_the_same_tokens_in_any_company(reference: Callable[[str], Reference]) -> None:
    """Alone, in a batch, in a batch that is preempted: the tokens of a seeded request are its own."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine:
        alone = [ids(await collect(engine.generate(prompt, SEEDED))) for prompt in made.prompts[:6]]
        other = ids(await collect(engine.generate(made.prompts[0], replace(SEEDED, seed=8))))
        batch = await asyncio.gather(*(collect(engine.generate(prompt, SEEDED)) for prompt in made.prompts[:6]))
    async with Engine(tight(made)) as engine:
        squeezed = await asyncio.gather(*(collect(engine.generate(prompt, SEEDED)) for prompt in made.prompts[:6]))
        assert engine.stats().preemptions > 0
    assert [ids(deltas) for deltas in batch] == alone
    assert [ids(deltas) for deltas in squeezed] == alone
    assert other != alone[0]


async def test_the_engines_seed_makes_unseeded_requests_reproducible(reference: Callable[[str], Reference]) -> None:
    """Two engines with one seed answer alike, and a request's seed in effect is told."""
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (1, 1, 2):
        async with Engine(roomy(reference("opt"), seed=seed)) as engine:
            generations = [await engine.submit([5, 6], params) for _ in range(3)]
            outputs = [ids(await collect(generation)) for generation in generations]
            repeated = replace(params, seed=generations[0].params.seed)
            assert ids(await collect(engine.generate([5, 6], repeated))) == outputs[0]
            runs.append(outputs)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("row", [0, 1, 2])
async def test_bad_logits_fail_one_request_alone(
    row: int, monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """NaN in one row: that request raises RequestFailedError after its text, the others finish with their tokens."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine:
        spoiled = []

        def spoil(logits: torch.Tensor) -> None:
            if not spoiled and len(logits) == 3 and engine.stats().generated_tokens > 20:
                spoiled.append(row)
                logits[row, 17] = float("nan")

        edit_logits(engine, monkeypatch, spoil)
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        results = await asyncio.gather(*map(collect, generations), return_exceptions=True)
        failed = [i for i, result in enumerate(results) if isinstance(result, RequestFailedError)]
        assert len(failed) == 1
        for i in {0, 1, 2} - set(failed):
            assert ids(results[i]) == made.outputs[i][:40]
        await idle(engine)
        assert ids(await collect(engine.generate(made.prompts[3], greedy(8)))) == made.outputs[3][:8]


async def test_failures_in_a_row_are_counted_until_a_request_ends_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: Callable[[str], Reference]
) -> None:
    """Error and log say in which type the logits are not finite, and what helps."""
    made = reference("opt")
    bad = True
    async with Engine(roomy(made)) as engine:

        def spoil(logits: torch.Tensor) -> None:
            if bad:
                logits.fill_(float("inf"))

        edit_logits(engine, monkeypatch, spoil)
        for count in (1, 2):
            with pytest.raises(NotFiniteError, match="not finite in float32; fetch the model's files again"):
                await collect(engine.generate(made.prompts[0], greedy(4)))
            assert engine.failed_in_a_row == count
        assert "not finite in float32" in caplog.text
        bad = False
        await collect(engine.generate(made.prompts[0], greedy(4)))
        assert engine.failed_in_a_row == 0
    assert "--dtype bfloat16" in str(NotFiniteError("float16"))


def boom(*args: object) -> None:
    raise RuntimeError("injected")


FAULTS = [
    (WeightPrefetcher, "launch"),
    (CacheManager, "launch"),
    (Forward, "launch"),
    (delivery_module, "next_deltas"),
    (Scheduler, "schedule"),
]
"""A call of each task."""


async def expect_fault(work: Any) -> None:
    with pytest.raises(EngineFaultError, match="see the log") as caught:
        await work
    assert "injected" in repr(caught.value.__cause__)


@pytest.mark.parametrize(("owner", "call"), FAULTS, ids=lambda each: getattr(each, "__name__", each))
async def test_a_fault_ends_everything_at_once(
    owner: object,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Reference],
) -> None:
    """Each live request and `wait_failed` raise, nothing more is taken, and the engine can be left."""
    made = reference("opt")
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(20), Engine(roomy(made, max_batch=2)) as engine:
        generations = [await engine.submit(prompt, greedy(60)) for prompt in made.prompts[:4]]
        watch = asyncio.create_task(engine.wait_failed())
        await anext(generations[0])
        monkeypatch.setattr(owner, call, boom)
        start = time.monotonic()
        await asyncio.gather(*(expect_fault(collect(generation)) for generation in generations))
        assert time.monotonic() - start < 1
        await expect_fault(watch)
        await expect_fault(engine.wait_failed())
        with pytest.raises(EngineUnavailableError):
            await engine.submit([5], greedy(1))
        for generation in generations:
            generation.close()
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize(
    ("make", "kind"),
    [(tight, OpKind.EMBED), (tight, OpKind.ATTEND), (tight, OpKind.SAMPLE), (weights_on_device, OpKind.ATTEND)],
)
async def test_running_out_of_device_memory_ends_the_step_alone(
    make: Callable[..., EngineConfig],
    kind: OpKind,
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Reference],
) -> None:
    """The step's requests end with OutOfDeviceMemoryError, buffers and blocks are back, the next one works."""
    made = reference("opt")
    async with Engine(make(made, max_batch=2)) as engine:
        generations = [await engine.submit(prompt, greedy(60)) for prompt in made.prompts[:2]]
        for generation in generations:
            await anext(generation)
        calls = []

        def run_out(_: object = None) -> None:
            calls.append(kind)
            if len(calls) == (4 if kind is OpKind.ATTEND else 1):
                raise torch.OutOfMemoryError("injected")

        if kind is OpKind.SAMPLE:
            before_sampling(monkeypatch, run_out)
        else:
            before(engine, monkeypatch, {kind}, run_out)
        for generation in generations:
            with pytest.raises(OutOfDeviceMemoryError):
                await collect(generation)
        assert ids(await collect(engine.generate(made.prompts[2], greedy(64)))) == made.outputs[2]
        await idle(engine)


async def test_a_tokenizer_error_fails_one_request_alone(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """Its text cannot be made: that request raises RequestFailedError, its neighbour finishes with its tokens."""
    made = reference("opt")
    async with Engine(roomy(made, max_batch=2)) as engine:
        first, second = [await engine.submit(prompt, greedy(64)) for prompt in made.prompts[:2]]
        await anext(first)
        monkeypatch.setattr(engine._delivery.live[first.request_id].detokenizer, "push", boom)
        failing, finishing = await asyncio.gather(collect(first), collect(second), return_exceptions=True)
        assert isinstance(failing, RequestFailedError)
        assert ids(finishing) == made.outputs[1]
        await idle(engine)


async def test_a_fault_does_not_wait_for_a_busy_thread(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """Requests end within a second although another task is in the middle of a call that takes longer."""
    async with Engine(roomy(reference("opt"))) as engine:
        generation = await engine.submit([5] * 20, greedy(60))
        await anext(generation)
        loop, slow = asyncio.get_running_loop(), asyncio.Event()

        def stall(*args: object) -> None:
            loop.call_soon_threadsafe(slow.set)
            time.sleep(1.5)

        monkeypatch.setattr(Forward, "launch", stall)
        await slow.wait()
        monkeypatch.setattr(delivery_module, "next_deltas", boom)
        start = time.monotonic()
        engine.abort(generation.request_id)
        await expect_fault(collect(generation))
        assert time.monotonic() - start < 1


async def test_the_event_loop_runs_while_the_device_computes(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """A call that takes long on the thread of any task holds up no other task of the loop."""
    async with Engine(roomy(reference("opt"))) as engine:
        slept = []
        for part in (Forward, CacheManager, WeightPrefetcher):
            monkeypatch.setattr(part, "launch", slow_once(part.launch, slept))
        generating = asyncio.create_task(collect(engine.generate([5] * 20, greedy(6))))
        ticks = 0
        while not generating.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert len(slept) == 3
        assert ticks > 10


def slow_once(function: Callable[..., Any], slept: list[object]) -> Callable[..., Any]:
    state = []

    def slow(*args: Any) -> Any:
        if not state:
            state.append(1)
            time.sleep(0.2)
            slept.append(function)
        return function(*args)

    return slow


async def test_counters_add_up(reference: Callable[[str], Reference]) -> None:
    """Tokens in and out, steps, and the most blocks in use."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine:
        await asyncio.gather(*(collect(engine.generate(prompt, greedy(10))) for prompt in made.prompts[:4]))
        await idle(engine)
        stats = engine.stats()
        assert stats.prompt_tokens == sum(map(len, made.prompts[:4]))
        assert stats.generated_tokens == 40
        assert stats.steps >= 10
        assert stats.step_seconds > 0
        assert stats.queued == stats.running == stats.preemptions == 0
        assert 0 < sum(stats.peak_blocks.values()) <= sum(engine.plan.num_blocks.values())


async def test_a_model_without_files_takes_token_ids_only() -> None:
    """Random weights of a known shape are served without a tokenizer; text is refused."""
    config = EngineConfig(model="random:opt-125m", device="cpu", max_model_len=64, gpu_memory="1GiB")
    async with Engine(config) as engine:
        with pytest.raises(InvalidRequestError, match="give token_ids"):
            await engine.submit("text", greedy(1))
        deltas = await collect(engine.generate([5, 6, 7], greedy(2)))
        assert len(ids(deltas)) == 2
        assert deltas[-1].finish.reason is FinishReason.MAX_TOKENS
        assert live(engine, "none") is None


async def test_the_heartbeat_is_the_age_of_the_step(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """0 when idle, however long; grows while a step does not end; 0 again once the work is done."""
    async with Engine(roomy(reference("opt"))) as engine:
        engine._last_beat -= 100
        assert engine.heartbeat() == 0
        execute, gate = Executor.execute, asyncio.Event()

        async def late(executor: Executor, step: Any, ahead: Any = None) -> Any:
            await gate.wait()
            return await execute(executor, step, ahead)

        monkeypatch.setattr(Executor, "execute", late)
        work = asyncio.create_task(collect(engine.generate([5], greedy(2))))
        await until(lambda: engine.heartbeat() > 0.05)
        assert engine.heartbeat() < 50
        gate.set()
        await work
        await idle(engine)
        assert engine.heartbeat() == 0


async def test_leaving_is_bounded(reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that does not end keeps nobody from leaving, and its memory is not freed under it."""
    monkeypatch.setattr(engine_module, "_STOP_SECONDS", 0.1)
    engine, closed, gate = Engine(roomy(reference("opt"))), [], asyncio.Event()
    async with engine:
        opened, main = parts(engine), engine._main
        close = opened.close
        monkeypatch.setattr(type(opened), "close", lambda _: closed.append(True))
        assert main is not None
        main.cancel()
        await asyncio.wait([main])
        engine._main = asyncio.create_task(_deaf(gate))
        await asyncio.sleep(0)
        hanging = engine._main
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert closed == []
    gate.set()
    await hanging
    await close()


async def _deaf(gate: asyncio.Event) -> None:
    """Does not end when it is cancelled."""
    while not gate.is_set():
        try:
            await gate.wait()
        except asyncio.CancelledError:
            continue
