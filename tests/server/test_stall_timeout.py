"""How long one write of a call may wait."""

from __future__ import annotations

import asyncio

import pytest

from hsrpc.server.errors import StalledClientError
from hsrpc.server.stall_timeout import StallTimeout


async def never() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("seconds", [0.0, 0.05])
async def test_a_write_that_waits_too_long_ends_the_block(seconds):
    """Even after others that did not; the block is left by a cancellation, so that it can clean up."""
    left = []

    async def write() -> None:
        async with StallTimeout(seconds) as limit:
            try:
                await limit.wait(asyncio.sleep(0, None))
                await asyncio.sleep(seconds / 2)
                await limit.wait(never())
            except asyncio.CancelledError:
                left.append(True)
                raise

    with pytest.raises(StalledClientError, match="no room to write"):
        await write()
    assert left


async def test_time_without_a_write_does_not_count():
    """A stream may be silent for longer than a write may take."""
    async with StallTimeout(0.2) as limit:
        for _ in range(2):
            await limit.wait(asyncio.sleep(0, None))
            await asyncio.sleep(0.4)


async def test_every_write_has_the_whole_time():
    """The timer that an earlier write set does not end a later one."""
    async with StallTimeout(1.0) as limit:
        await limit.wait(asyncio.sleep(0, None))
        await asyncio.sleep(0.6)
        await limit.wait(asyncio.sleep(0.6, None))


async def test_writes_share_one_timer(monkeypatch):
    """A thousand writes set one, and none is left after the block."""
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at
    monkeypatch.setattr(loop, "call_at", lambda *args, **rest: timers.append(call_at(*args, **rest)) or timers[-1])
    async with StallTimeout(30.0) as limit:
        for _ in range(1000):
            await limit.wait(asyncio.sleep(0, None))
    assert len(timers) == 1
    assert timers[0].cancelled()


async def test_what_else_ends_the_block_passes():
    """Errors of the block, a TimeoutError of its own too, and a cancellation from outside stay what they are."""
    for error in (ValueError("wrong"), TimeoutError("its own")):
        with pytest.raises(type(error), match=str(error)):
            async with StallTimeout(30.0):
                raise error

    async def write() -> None:
        async with StallTimeout(30.0) as limit:
            await limit.wait(never())

    task = asyncio.create_task(write())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
