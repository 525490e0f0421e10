"""The thread that a task owns."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import pytest
import torch

from hsrpc.engine.worker import Worker


async def test_calls_run_on_one_thread_in_order_and_in_inference_mode() -> None:
    """Results come back to the loop, errors too, and a call after an error runs as any other."""
    ran: list[tuple[int, str]] = []

    def call(number: int) -> tuple[int, bool]:
        ran.append((number, threading.current_thread().name))
        if number == 2:
            raise ValueError("two")
        return number, torch.is_inference_mode_enabled()

    async with Worker("owned") as worker:
        results = await asyncio.gather(
            *(worker.run(lambda number=number: call(number)) for number in range(4)), return_exceptions=True
        )
    assert ran == [(number, "owned") for number in range(4)]
    assert [results[0], results[1], results[3]] == [(0, True), (1, True), (3, True)]
    assert isinstance(results[2], ValueError)


async def test_a_cancelled_wait_leaves_the_call_and_the_next_ones_alone() -> None:
    """A call under way runs to its end, one that has not begun never runs, and later ones work."""
    begun, proceed, ran = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        proceed.wait(20)
        ran.append("slow")

    async with Worker("owned") as worker:
        under_way = asyncio.create_task(worker.run(slow))
        queued = asyncio.create_task(worker.run(lambda: ran.append("queued")))
        await asyncio.to_thread(begun.wait, 20)
        for task in (under_way, queued):
            task.cancel()
        await asyncio.gather(under_way, queued, return_exceptions=True)
        proceed.set()
        await worker.run(lambda: ran.append("later"))
    assert ran == ["slow", "later"]


async def test_leaving_waits_for_the_call_under_way() -> None:
    """Whoever leaves, cancelled, frees memory that the call may use."""
    begun, ended = threading.Event(), []

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.2)
        ended.append(True)

    async def task() -> None:
        async with Worker("owned") as worker:
            await worker.run(slow)

    running = asyncio.create_task(task())
    await asyncio.to_thread(begun.wait, 20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended == [True]
    assert "owned" not in {thread.name for thread in threading.enumerate()}


async def test_an_idle_thread_holds_nothing_of_its_last_call() -> None:
    """Neither its function nor its result."""

    class Large:
        pass

    async with Worker("owned") as worker:
        large = Large()
        held = weakref.ref(large)
        assert await worker.run(lambda large=large: large) is large
        del large
        await worker.run(lambda: None)
        assert held() is None


async def test_a_handled_error_holds_nothing() -> None:
    """No cycle of error and frames is left, which would keep a failed step's tensors until the collector comes."""
    held: list[weakref.ref[object]] = []

    class Large:
        pass

    def fail() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise ValueError("failed")

    gc.disable()
    try:
        async with Worker("owned") as worker:
            with suppress(ValueError):
                await worker.run(fail)
            await worker.run(lambda: None)
            assert held[0]() is None
    finally:
        gc.enable()


def test_a_program_may_end_without_leaving() -> None:
    """As one does whose engine's tasks did not end in time."""
    subprocess.run(
        [sys.executable, "-c", "from hsrpc.engine.worker import Worker; Worker('owned')"], check=True, timeout=60
    )
