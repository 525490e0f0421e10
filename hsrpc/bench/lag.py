"""How late the event loop runs what is due."""

from __future__ import annotations

import asyncio
import time

_PERIOD = 0.005


class LoopLag:
    """Samples the lag, seconds, while it is entered."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LoopLag:
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def p99(self) -> float:
        """The 99th percentile; 0 without samples."""
        ordered = sorted(self._samples)
        return ordered[len(ordered) * 99 // 100] if ordered else 0.0

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + _PERIOD
            await asyncio.sleep(_PERIOD)
            self._samples.append(time.perf_counter() - due)
