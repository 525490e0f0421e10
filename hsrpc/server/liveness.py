"""Liveness: the engine stepped lately, or has nothing to do; and not every request fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hsrpc.server.engine_protocol import Engine

_MAX_PERIOD = 1.0
"""Seconds between two looks at the engine."""
MAX_FAILED_IN_A_ROW = 8
"""From so many requests on that could not go on, without one between that ended well, the engine is not alive."""


async def watch_engine(engine: Engine, limit: float, report: Callable[[bool], Awaitable[None]]) -> None:
    """Report False when a step has taken longer than `limit` s or all requests fail, True when it goes on again.

    Until cancelled.
    """
    alive = True
    while True:
        await asyncio.sleep(min(_MAX_PERIOD, limit / 4))
        now_alive = engine.heartbeat() <= limit and engine.failed_in_a_row < MAX_FAILED_IN_A_ROW
        if now_alive != alive:
            alive = now_alive
            await report(alive)
