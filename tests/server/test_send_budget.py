"""Bytes that wait to be taken, bounded by connection and in all."""

from __future__ import annotations

import asyncio

import pytest

from hsrpc.server import send_budget
from hsrpc.server.send_budget import SendBudget, Sending


def nobody() -> None:
    raise AssertionError("nobody has to give way")


async def settled(task: asyncio.Task[Sending]) -> bool:
    """Whether it is done once everything that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return task.done()


async def test_a_connection_waits_for_itself_alone():
    """Beyond its bound messages wait, in order; another connection's do not."""
    budget = SendBudget(1000, 100)
    first = await budget.take("a", 80, nobody)
    second, third = (asyncio.create_task(budget.take("a", size, nobody)) for size in (30, 10))
    assert not await settled(second)
    assert not third.done()
    other = await budget.take("b", 100, nobody)
    assert (budget.held, budget.held_by("a"), budget.held_by("b")) == (180, 80, 100)
    budget.release(first)
    assert await settled(second)
    assert await settled(third)
    assert budget.held_by("a") == 40
    for sending in (other, await second, await third):
        budget.release(sending)
        budget.release(sending)
    assert (budget.held, budget.held_by("a"), budget.held_by("b")) == (0, 0, 0)


async def test_a_message_beyond_the_bound_goes_alone():
    """It waits until nothing else is under way, and others wait for it."""
    budget = SendBudget(1000, 100)
    first = await budget.take("a", 1, nobody)
    large = asyncio.create_task(budget.take("a", 500, nobody))
    assert not await settled(large)
    budget.release(first)
    assert await settled(large)
    small = asyncio.create_task(budget.take("a", 1, nobody))
    assert not await settled(small)
    budget.release(await large)
    budget.release(await small)
    assert budget.held == 0


@pytest.mark.parametrize("had_turn", [False, True])
async def test_who_stops_waiting_holds_nothing(had_turn):
    """Nor does it stand before others, whether it has been given room meanwhile or not."""
    budget = SendBudget(1000, 100)
    first = await budget.take("a", 100, nobody)
    leaving, staying = (asyncio.create_task(budget.take("a", 60, nobody)) for _ in range(2))
    assert not await settled(staying)
    if had_turn:
        budget.release(first)
    leaving.cancel()
    if not had_turn:
        budget.release(first)
    assert await settled(staying)
    assert leaving.cancelled()
    budget.release(await staying)
    assert (budget.held, budget.held_by("a")) == (0, 0)


async def test_the_oldest_gives_way_to_all(monkeypatch):
    """As many as are needed, once they have had their time; younger ones go on."""
    monkeypatch.setattr(send_budget, "_PATIENCE", 0.05)
    budget, gone = SendBudget(100, 100), []
    for name in "abc":
        await budget.take(name, 30, lambda name=name: gone.append(name))
    taken = asyncio.create_task(budget.take("d", 60, nobody))
    assert not await settled(taken)
    assert not gone
    await asyncio.wait_for(taken, 10)
    assert gone == ["a", "b"]
    assert budget.held == 90
