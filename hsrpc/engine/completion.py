"""Ends that are reached whoever loses patience."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def complete(task: asyncio.Task[T]) -> T:
    """The result of `task`, which is waited for although the caller is cancelled; that is raised once it has ended."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
