"""Calls of many clients on one thread."""

from __future__ import annotations

import asyncio
import gc
import operator
import threading
import weakref
from collections.abc import AsyncIterator

import pytest

from hsrpc.engine.fair_thread import FairThread


class Text:
    """Something that a call is given."""


class Held:
    """A thread that is busy until it is let go; notes which calls it makes after that."""

    def __init__(self, thread: FairThread) -> None:
        self.thread = thread
        self.order: list[str] = []
        self._begun, self._go_on = threading.Event(), threading.Event()
        self._first = asyncio.create_task(thread.run("first", self._wait))

    async def begin(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, 20)

    def ask(self, client: str, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.thread.run(client, self.order.append, name))

    async def let_go(self) -> None:
        self._go_on.set()
        await asyncio.wait([self._first])

    def _wait(self) -> None:
        self._begun.set()
        assert self._go_on.wait(20)


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    made = Held(FairThread("fair"))
    await made.begin()
    yield made
    await made.let_go()
    made.thread.close()


async def test_clients_take_turns(held: Held) -> None:
    """One call of a client passes all but the first of another's; each client's own keep their order."""
    calls = [held.ask("heavy", f"h{i}") for i in range(4)]
    calls += [held.ask("light", f"l{i}") for i in range(2)]
    calls += [held.ask("late", "x")]
    await asyncio.sleep(0)
    await held.let_go()
    await asyncio.gather(*calls)
    assert held.order == ["h0", "l0", "x", "h1", "l1", "h2", "h3"]


async def test_a_cancelled_call_is_not_made_and_holds_nothing(held: Held) -> None:
    """Neither the only one of its client nor one among others; what it was given is free at once."""
    text = Text()
    gone = weakref.ref(text)
    calls = [held.ask("a", "a0"), held.ask("b", "b0"), held.ask("b", "b1"), held.ask("b", "b2")]
    large = asyncio.create_task(held.thread.run("c", print, text))
    await asyncio.sleep(0)
    cancelled = [calls[0], calls[2], large]
    for call in cancelled:
        call.cancel()
    await asyncio.wait(cancelled)
    del text, large, call, cancelled
    gc.collect()
    assert gone() is None
    await held.let_go()
    await asyncio.wait(calls)
    assert held.order == ["b0", "b2"]
    await held.ask("a", "again")
    assert held.order[-1] == "again"


async def test_a_call_under_way_runs_to_its_end(held: Held) -> None:
    """Whoever asked for it may leave; the next call waits for it and is made."""
    following = held.ask("first", "next")
    await asyncio.sleep(0)
    held._first.cancel()
    await asyncio.wait([held._first])
    assert held.order == []
    await held.let_go()
    await following
    assert held.order == ["next"]


async def test_an_error_is_the_callers(held: Held) -> None:
    """It is raised where the call was asked for, holds nothing in a cycle, and the thread goes on."""
    await held.let_go()
    text = Text()
    gone = weakref.ref(text)
    gc.disable()
    try:
        with pytest.raises(TypeError, match="Text"):
            await held.thread.run("a", operator.index, text)
        del text
        await held.ask("a", "after")
        assert gone() is None
    finally:
        gc.enable()
    assert held.order == ["after"]


async def test_what_waits_at_the_end_is_done(held: Held) -> None:
    """After close nothing new is taken, and nobody who waits is left alone."""
    waiting = held.ask("a", "a0")
    await asyncio.sleep(0)
    held.thread.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        await held.thread.run("a", print)
    await held.let_go()
    await waiting
    assert held.order == ["a0"]
