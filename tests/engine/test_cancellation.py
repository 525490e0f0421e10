"""A request that is given up, at whatever moment and in whatever way, leaves the engine as it was before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from types import coroutine
from typing import Any

import pytest

from hsrpc import Engine, EngineConfig
from hsrpc.engine import loading, opened_model
from hsrpc.engine.generation import Generation
from hsrpc.engine.weights import LayerWeights, ModelWeights
from hsrpc.errors import EngineUnavailableError
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.sweep import Op, OpKind
from tests.engine.reference import Reference
from tests.engine.support import (
    before,
    collect,
    greedy,
    idle,
    ids,
    left_as_found,
    live,
    roomy,
    text,
    tight,
    until,
    weights_on_device,
)

pytestmark = pytest.mark.usefixtures("ordered")

PROMPT = "a prompt that is computed in two chunks"
MAX_TOKENS = 6
AWAITS = 16
"""More than the consumer of one request passes: encode, detokenizer, one for each delta, and none afterwards."""

Leave = Callable[[Engine, Generation, "asyncio.Task[object]"], object]
WAYS: dict[str, Leave] = {
    "close": lambda engine, generation, task: generation.close(),
    "abort": lambda engine, generation, task: engine.abort(generation.request_id),
    "cancel": lambda engine, generation, task: task.cancel(),
    "close twice": lambda engine, generation, task: (generation.close(), generation.close()),
    "abort and close": lambda engine, generation, task: (engine.abort(generation.request_id), generation.close()),
}


@coroutine
def cancelled_at(work: Coroutine[Any, Any, object], index: int, delay: float) -> Generator[Any, Any, bool]:
    """Runs `work`, cancelling this task at its `index`-th await, `delay` seconds into it. False: it has fewer."""
    task = asyncio.current_task()
    assert task is not None
    awaits = 0
    while True:
        try:
            future = work.send(None)
        except StopIteration:
            return awaits > index
        if awaits == index and delay == 0:
            task.cancel()
        elif awaits == index:
            asyncio.get_running_loop().call_later(delay, task.cancel)
        awaits += 1
        try:
            yield future
        except asyncio.CancelledError as error:
            work.throw(error)


async def attempt(engine: Engine, index: int, delay: float, params: SamplingParams) -> bool:
    """One request of which the consumer is cancelled at an await; whether it came that far."""

    async def run() -> bool:
        return await cancelled_at(collect(engine.generate(PROMPT, params)), index, delay)

    try:
        return await asyncio.create_task(run())
    except asyncio.CancelledError:
        return True


@pytest.mark.parametrize("make", [roomy, weights_on_device])
@pytest.mark.parametrize("delay", [0.0, 0.002])
async def test_cancelling_at_any_await_leaves_no_trace(
    delay: float, make: Callable[[Reference], EngineConfig], reference: Callable[[str], Reference]
) -> None:
    """Encoding, waiting for the first token, between tokens: wherever it is cancelled, everything is back."""
    made = reference("opt")
    async with Engine(make(made)) as engine:
        reached = []
        for index in range(AWAITS):
            async with left_as_found(engine):
                reached.append(await attempt(engine, index, delay, greedy(MAX_TOKENS)))
        assert all(reached[:3])
        assert not reached[-1]
        assert ids(await collect(engine.generate(made.prompts[0], greedy(12)))) == made.outputs[0][:12]


@pytest.mark.parametrize("make", [tight, weights_on_device])
async def test_cancelling_in_a_crowd_changes_nobody_elses_tokens(
    make: Callable[[Reference], EngineConfig], reference: Callable[[str], Reference]
) -> None:
    """Requests before and behind the crowd are cancelled at every await, under preemption; the crowd never notices."""
    made = reference("opt")
    async with Engine(make(made)) as engine, asyncio.TaskGroup() as group, left_as_found(engine):
        crowd = [asyncio.create_task(collect(engine.generate(p, greedy(64)))) for p in made.prompts[:8]]
        for index in range(AWAITS):
            for priority in (-1, 1):
                group.create_task(attempt(engine, index, 0.001 * index, greedy(MAX_TOKENS, priority=priority)))
        assert [ids(await task) for task in crowd] == made.outputs[:8]
        assert engine.stats().preemptions > 0
        await idle(engine)


def is_queued(engine: Engine, request_id: str) -> bool:
    request = live(engine, request_id)
    return request is not None and request.scheduled_time is None and engine.stats().queued > 0


def is_prefilling(engine: Engine, request_id: str) -> bool:
    request = live(engine, request_id)
    return request is not None and 0 < request.num_computed < request.num_prompt_tokens


def is_decoding(engine: Engine, request_id: str) -> bool:
    request = live(engine, request_id)
    return request is not None and request.num_output_tokens > 1


def is_preempted(engine: Engine, request_id: str) -> bool:
    request = live(engine, request_id)
    return request is not None and request.preemptions > 0 and request.num_computed == 0


STATES = {"queued": is_queued, "prefilling": is_prefilling, "decoding": is_decoding, "preempted": is_preempted}


@pytest.mark.parametrize("state", STATES)
async def test_leaving_in_any_state_and_way_leaves_no_trace(state: str, reference: Callable[[str], Reference]) -> None:
    """Queued, in the middle of a chunked prompt, decoding or preempted; closed, aborted or cancelled."""
    made = reference("opt")
    num_others = {"queued": 6, "preempted": 5}.get(state, 0)
    async with Engine(tight(made)) as engine:
        for way in WAYS.values():
            async with left_as_found(engine):
                others = [await engine.submit(made.prompts[i], greedy(64)) for i in range(num_others)]
                chosen = await engine.submit([5] * 40, greedy(64, priority=1))
                task = asyncio.create_task(collect(chosen))
                await until(lambda chosen=chosen: STATES[state](engine, chosen.request_id))
                way(engine, chosen, task)
                with suppress(asyncio.CancelledError):
                    await task
                for generation in [chosen, *others]:
                    generation.close()
        assert ids(await collect(engine.generate(made.prompts[0], greedy(12)))) == made.outputs[0][:12]


async def test_closing_the_generator_ends_the_request(reference: Callable[[str], Reference]) -> None:
    """Leaving `async for` early and closing the generator, before and after it has begun, frees all."""
    async with Engine(roomy(reference("opt"))) as engine, left_as_found(engine):
        await engine.generate(PROMPT, greedy(64)).aclose()
        begun = engine.generate(PROMPT, greedy(64))
        await anext(begun)
        await begun.aclose()
        await begun.aclose()


async def test_abort_gives_the_output_so_far_and_one_finish(reference: Callable[[str], Reference]) -> None:
    """The consumer gets what there is, then reason ABORTED; a second abort finds nothing."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine, asyncio.timeout(20):
        generation = await engine.submit(made.prompts[0], greedy(64), request_id="a")
        first = await anext(generation)
        assert engine.abort("a")
        assert not engine.abort("a")
        deltas = [first, *await collect(generation)]
        assert [delta.finish is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert deltas[-1].finish.reason is FinishReason.ABORTED
        assert ids(deltas) == made.outputs[0][: len(ids(deltas))]
        assert deltas[-1].finish.usage.completion_tokens == len(ids(deltas))
        assert text(deltas) == await engine.tokenizer.decode(
            [i for i in ids(deltas) if i < engine.tokenizer.vocab_size]
        )
        assert not engine.abort("a")
        await idle(engine)


async def test_an_id_is_free_as_soon_as_its_request_is_closed(reference: Callable[[str], Reference]) -> None:
    """A request with the id of one that was closed, while the step that computed it still runs, is another request."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine, left_as_found(engine):
        for prompt, expected in zip(made.prompts[:4], made.outputs, strict=False):
            first = await engine.submit(made.prompts[5], greedy(64), request_id="same")
            await anext(first)
            first.close()
            second = await engine.submit(prompt, greedy(8), request_id="same")
            first.close()
            assert ids(await collect(second)) == expected[:8]


async def test_closing_wakes_whoever_waits(reference: Callable[[str], Reference]) -> None:
    """Another task that waits for a delta of a closed request ends its loop."""
    async with Engine(roomy(reference("opt"), max_batch=1)) as engine, asyncio.timeout(20):
        running = await engine.submit(PROMPT, greedy(60))
        queued = await engine.submit(PROMPT, greedy(60))
        task = asyncio.create_task(collect(queued))
        await asyncio.sleep(0)
        queued.close()
        assert await task == []
        running.close()


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
@pytest.mark.parametrize("make", [roomy, weights_on_device])
async def test_an_abandoned_step_stops_by_the_next_layer(
    make: Callable[[Reference], EngineConfig],
    layers: int,
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once all its requests have left, no further layer is computed, and the next request is computed rightly."""
    made = reference("opt")
    async with Engine(make(made)) as engine:
        loop, computed = asyncio.get_running_loop(), []

        def leave_in_a_layer(op: Op) -> None:
            computed.append(op)
            if len(computed) == layers:
                asyncio.run_coroutine_threadsafe(leave(), loop).result(20)

        async def leave() -> None:
            generation.close()

        before(engine, monkeypatch, {OpKind.ATTEND}, leave_in_a_layer)
        async with left_as_found(engine):
            generation = await engine.submit([7] * 20, greedy(64))
            await until(lambda: len(computed) == layers)
        assert len(computed) == layers
        assert ids(await collect(engine.generate(made.prompts[1], greedy(20)))) == made.outputs[1][:20]


def engine_threads() -> set[str]:
    prefixes = ("hsrpc-", "load", "weights", "cache", "compute")
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(prefixes)}


@pytest.mark.parametrize("make", [tight, weights_on_device])
async def test_shutting_down_ends_every_request(
    make: Callable[[Reference], EngineConfig], reference: Callable[[str], Reference]
) -> None:
    """Running and queued requests raise EngineUnavailableError; tasks and threads are gone."""
    made = reference("opt")
    tasks = asyncio.all_tasks()
    async with Engine(make(made)) as engine:
        generations = [await engine.submit(prompt, greedy(64)) for prompt in made.prompts[:8]]
        await anext(generations[0])
    for generation in generations:
        with pytest.raises(EngineUnavailableError, match="shut down"):
            await collect(generation)
        generation.close()
    assert asyncio.all_tasks() == tasks
    await until(lambda: not engine_threads())


async def test_a_prompt_being_encoded_at_shutdown_is_refused(reference: Callable[[str], Reference]) -> None:
    """The caller hears that the engine is gone: not a cancellation that nobody asked for."""
    async with Engine(roomy(reference("opt"))) as engine:
        busy = threading.Event()
        holding = asyncio.create_task(engine.tokenizer._short.run("", busy.wait, 20))
        submitting = asyncio.create_task(engine.submit(PROMPT, greedy(4)))
        await asyncio.sleep(0.01)
    busy.set()
    with pytest.raises(EngineUnavailableError):
        await submitting
    await holding
    await until(lambda: not engine_threads())


async def test_cancelling_while_loading_stops_it(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """The layer being read is the last one; no thread is left."""
    layers, started, proceed = [], threading.Event(), threading.Event()

    def slow(*args: object) -> LayerWeights:
        layers.append(args)
        started.set()
        assert proceed.wait(20)
        return read_packed(*args)

    read_packed = loading._Loader._read_packed
    monkeypatch.setattr(loading._Loader, "_read_packed", slow)
    monkeypatch.setattr(loading.os, "cpu_count", lambda: 1)
    entering = asyncio.create_task(Engine(roomy(reference("opt"))).__aenter__())
    await asyncio.to_thread(started.wait, 20)
    entering.cancel()
    await asyncio.sleep(0.01)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await until(lambda: not engine_threads())
    assert len(layers) == 1


async def cancel_until(proceed: threading.Event, task: asyncio.Task[Any]) -> None:
    """Cancel it several times while it is held up: it ends, cancelled, when it may proceed."""
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_again_while_loading_stops_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """An impatient caller does not leave memory or threads behind."""
    released, started, proceed = [], threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> ModelWeights:
        started.set()
        assert proceed.wait(20)
        return load_weights(*args, **options)

    load_weights = opened_model.load_weights
    monkeypatch.setattr(opened_model, "load_weights", slow)
    monkeypatch.setattr("hsrpc.device.device.CpuDevice.release_pinned", lambda device: released.append(1))
    entering = asyncio.create_task(Engine(roomy(reference("opt"))).__aenter__())
    await asyncio.to_thread(started.wait, 20)
    before = len(released)
    await cancel_until(proceed, entering)
    assert len(released) > before
    await until(lambda: not engine_threads())


async def test_cancelling_while_it_is_left_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """Leaving an engine ends, then the cancellation is told."""
    engine, begun, proceed, given_back = Engine(roomy(reference("opt"))), threading.Event(), threading.Event(), []
    await engine.__aenter__()

    def slow(device: object) -> None:
        begun.set()
        assert proceed.wait(20)

    monkeypatch.setattr("hsrpc.device.device.CpuDevice.release_pinned", slow)
    monkeypatch.setattr("hsrpc.device.device.CpuDevice.release_cached", lambda device: given_back.append(1))
    leaving = asyncio.create_task(engine.__aexit__(None, None, None))
    await asyncio.to_thread(begun.wait, 20)
    await cancel_until(proceed, leaving)
    assert given_back == [1]
    await until(lambda: not engine_threads())


async def test_cancelling_at_the_end_of_loading_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """What had just been opened when the caller left is closed."""
    released = []
    monkeypatch.setattr("hsrpc.device.device.CpuDevice.release_pinned", lambda device: released.append(1))
    monkeypatch.setattr(
        "hsrpc.device.device.CpuDevice.drain", lambda device: entering.get_loop().call_soon_threadsafe(entering.cancel)
    )
    entering = asyncio.create_task(Engine(roomy(reference("opt"))).__aenter__())
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert released == [1]
    await until(lambda: not engine_threads())
