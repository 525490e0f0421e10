"""Counts what an engine does, and tells of each step."""

from __future__ import annotations

import time
from collections.abc import Callable

from hsrpc.engine.gpus.contract import Moved
from hsrpc.engine.startup import Components
from hsrpc.engine.stats import EngineStats
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.scheduler import Scheduler
from hsrpc.schedule.step import StepCounts


class Meter:
    """What only grows counts since it was made."""

    def __init__(
        self, components: Components, scheduler: Scheduler, observe: Callable[[StepRecord], object] | None
    ) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.recomputed_tokens = 0
        self._components = components
        self._scheduler = scheduler
        self._observe = observe
        self._steps = 0
        self._step_seconds = 0.0
        self._began = time.monotonic()
        self._moved = self._components.gpus.moved()
        self._peak_blocks = dict.fromkeys(PoolId, 0)

    def begin(self) -> None:
        """Work has come after a pause: the time until now belongs to no step."""
        self._began = time.monotonic()

    def note_blocks(self) -> None:
        """Blocks for a step are taken."""
        for pool, used in self._used_blocks().items():
            self._peak_blocks[pool] = max(self._peak_blocks[pool], used)

    def note_step(self, counts: StepCounts) -> None:
        """The tokens of a step are there: it took the time since those of the step before, or since `begin`."""
        now, moved = time.monotonic(), self._components.gpus.moved()
        seconds, self._began = now - self._began, now
        new = Moved(*(each - old for old, each in zip(self._moved, moved, strict=True)))
        self._moved = moved
        self._steps += 1
        self._step_seconds += seconds
        self.recomputed_tokens += counts.recomputed
        if self._observe is not None:
            self._observe(
                StepRecord(
                    seconds=seconds,
                    num_requests=counts.requests,
                    decode_tokens=counts.decode,
                    prefill_tokens=counts.prefill,
                    recomputed_tokens=counts.recomputed,
                    drafted_tokens=counts.drafted,
                    context_tokens=counts.context,
                    weight_bytes=new.weight_bytes,
                    cache_bytes=new.cache_bytes,
                    regenerated_tokens=new.regenerated_tokens,
                    expert_hits=new.expert_hits,
                    expert_loads=new.expert_loads,
                )
            )

    def stats(self) -> EngineStats:
        """Counters at this moment."""
        moved = self._components.gpus.moved()
        return EngineStats(
            queued=self._scheduler.num_waiting,
            queued_tokens=self._scheduler.num_waiting_tokens,
            running=self._scheduler.num_running,
            used_blocks=self._used_blocks(),
            peak_blocks=dict(self._peak_blocks),
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self._scheduler.preemptions,
            weights_streamed_bytes=moved.weight_bytes,
            cache_loaded_bytes=moved.cache_bytes,
            regenerated_tokens=moved.regenerated_tokens,
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            drafted_tokens=self._scheduler.drafted_tokens,
            accepted_tokens=self._scheduler.accepted_tokens,
            expert_hits=moved.expert_hits,
            expert_loads=moved.expert_loads,
            expert_loaded_bytes=moved.expert_bytes,
            peak_device_bytes=self._components.gpus.peak_memory,
        )

    def _used_blocks(self) -> dict[PoolId, int]:
        """Blocks of all GPUs that are held."""
        managers = self._scheduler.blocks
        return {pool: sum(blocks.pools[pool].num_used for blocks in managers) for pool in PoolId}
