"""One GPU in this process: its memory, and the three tasks that run a step's list on it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hsrpc.device.device import Device
from hsrpc.engine.gpus.contract import GpuUse, Moved, StepResult, Task
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.tasks.executor import Executor
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.schedule.step import Scheduled, Step


@dataclass(slots=True)
class OneGpu:
    """The GPU of this process; see `Gpus`."""

    device: Device
    prefetcher: WeightPrefetcher
    cache: CacheManager
    executor: Executor
    _busy_seconds: float = 0.0

    @property
    def count(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def tasks(self) -> Sequence[Task]:
        return self.prefetcher.run, self.cache.run, self.executor.run

    @property
    def warms_up(self) -> bool:
        return self.device.warms_up

    @property
    def runs_ahead(self) -> bool:
        return self.executor.runs_ahead

    @property
    def num_queued(self) -> int:
        return self.executor.num_queued

    def assemble(self, scheduled: Scheduled) -> Step:
        return self.executor.assemble(scheduled)

    async def execute(self, step: Step, ahead: Step | None = None) -> StepResult | None:
        began = time.monotonic()
        try:
            return await self.executor.execute(step, ahead)
        finally:
            self._busy_seconds += time.monotonic() - began

    def moved(self) -> Moved:
        regenerated = self.executor.forward.regenerated_tokens
        return Moved(
            self.prefetcher.streamed_bytes, self.cache.loaded_bytes, regenerated, *self.prefetcher.expert_counts
        )

    def uses(self) -> Sequence[GpuUse]:
        return [GpuUse(self.moved(), self.device.memory, self._busy_seconds)]

    def reset_counts(self) -> None:
        self._busy_seconds = 0.0
        self.prefetcher.reset_counts()
        self.cache.loaded_bytes = self.executor.forward.regenerated_tokens = 0

    async def close(self) -> Callable[[], None]:
        await asyncio.to_thread(self.device.release_pinned)
        return partial(_release, self.device)


def _release(device: Device) -> None:
    gc.unfreeze()
    gc.collect()  # what the ended tasks' tracebacks still hold
    device.release_cached()
