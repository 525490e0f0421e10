"""Run a coroutine to its end although the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end although the caller is cancelled.

    Raises:
        CancelledError: the caller was cancelled meanwhile; raised once `work` has ended.
        Exception: whatever `work` raised; it takes precedence over the cancellation.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
