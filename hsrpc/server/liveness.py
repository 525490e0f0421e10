"""Liveness: the engine stepped lately, or has nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hsrpc.server.engine_protocol import Engine

_MAX_PERIOD = 1.0
"""Seconds between two looks at the heartbeat."""


async def watch_steps(engine: Engine, limit: float, report: Callable[[bool], Awaitable[None]]) -> None:
    """Report False when a step has taken longer than `limit` s, True when the engine goes on; until cancelled."""
    alive = True
    while True:
        await asyncio.sleep(min(_MAX_PERIOD, limit / 4))
        now_alive = engine.heartbeat() <= limit
        if now_alive != alive:
            alive = now_alive
            await report(alive)
