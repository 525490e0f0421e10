"""The executor: what a step's list takes over from the one before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from hsrpc import Engine
from hsrpc.engine.tasks.executor import Executor
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.model.sampler import Sampled
from hsrpc.schedule.step import Step
from hsrpc.schedule.sweep import Op, OpKind
from tests.engine.reference import Reference
from tests.engine.support import PATIENCE, before, before_sampling, collect, greedy, idle, ids, roomy


def goes_on(step: Step) -> bool:
    """Its list finds weights that the one before has loaded."""
    return any(number < 0 for op in step.ops.ops for number in op.after)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Step, bool]]:
    """Steps, and whether they were run to their ends."""
    execute, found = Executor.execute, []

    async def noted(executor: Executor, step: Step, ahead: Step | None = None) -> list[Sampled] | None:
        result = None
        try:
            result = await execute(executor, step, ahead)
        finally:
            found.append((step, result is not None))
        return result

    monkeypatch.setattr(Executor, "execute", noted)
    return found


def check(executed: list[tuple[Step, bool]], num_failed: int) -> None:
    """A list goes on behind one that was run to its end, and begins anew behind one that was not."""
    assert [is_whole for _, is_whole in executed].count(False) == num_failed
    assert not goes_on(executed[0][0])
    assert all(goes_on(step) == was_whole for (_, was_whole), (step, _) in pairwise(executed))


@pytest.mark.usefixtures("ordered")
@pytest.mark.parametrize("kind", [OpKind.EMBED, OpKind.PROJECT, OpKind.ATTEND, OpKind.FINISH])
async def test_a_list_begins_anew_behind_a_step_given_up(
    kind: OpKind,
    executed: list[tuple[Step, bool]],
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Reference],
) -> None:
    """Nobody waits for it any more, wherever it is; what it has loaded ahead is not relied upon."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine, asyncio.timeout(PATIENCE):
        loop, closed = asyncio.get_running_loop(), threading.Event()
        generation = await engine.submit(made.prompts[0], greedy(20))

        def close() -> None:
            generation.close()
            closed.set()

        def give_up(_: Op) -> None:
            if len(executed) >= 3 and not closed.is_set():
                loop.call_soon_threadsafe(close)
                assert closed.wait(PATIENCE)

        before(engine, monkeypatch, {kind}, give_up)
        await collect(generation)
        assert ids(await collect(engine.generate(made.prompts[1], greedy(5)))) == made.outputs[1][:5]
        await idle(engine)
        check(executed, 1)


@pytest.mark.usefixtures("ordered")
async def test_a_list_begins_anew_behind_a_step_without_memory(
    executed: list[tuple[Step, bool]], monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """Though its loads may all have been launched."""
    made = reference("opt")
    async with Engine(roomy(made)) as engine, asyncio.timeout(PATIENCE):
        errors = iter([None, None, torch.OutOfMemoryError("no memory")])

        def run_out() -> None:
            if (error := next(errors, None)) is not None:
                raise error

        before_sampling(monkeypatch, run_out)
        with pytest.raises(OutOfDeviceMemoryError):
            await collect(engine.generate(made.prompts[0], greedy(20)))
        assert ids(await collect(engine.generate(made.prompts[1], greedy(5)))) == made.outputs[1][:5]
        await idle(engine)
        check(executed, 1)
