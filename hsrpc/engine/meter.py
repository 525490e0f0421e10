"""Counts what an engine does, and tells of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from hsrpc.engine.gpus.contract import Moved
from hsrpc.engine.startup import Components
from hsrpc.engine.stats import EngineStats, GpuStats
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.blocks import BlockManager, PoolId
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
        self._peak_blocks_each = [dict.fromkeys(PoolId, 0) for _ in scheduler.blocks]

    def begin(self) -> None:
        """Work has come after a pause: the time until now belongs to no step."""
        self._began = time.monotonic()

    def note_blocks(self) -> None:
        """Blocks for a step are taken."""
        each = [_used(blocks) for blocks in self._scheduler.blocks]
        for used, peaks in zip(each, self._peak_blocks_each, strict=True):
            _raise(peaks, used)
        _raise(self._peak_blocks, {pool: sum(used[pool] for used in each) for pool in PoolId})

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
                    num_gpus=self._components.gpus.count,
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
            gpus=self._gpus(),
            peak_blocks=dict(self._peak_blocks),
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self._scheduler.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            drafted_tokens=self._scheduler.drafted_tokens,
            accepted_tokens=self._scheduler.accepted_tokens,
            expert_hits=moved.expert_hits,
            expert_loads=moved.expert_loads,
            expert_loaded_bytes=moved.expert_bytes,
        )

    def _gpus(self) -> list[GpuStats]:
        scheduler = self._scheduler
        each = (self._components.gpus.uses(), scheduler.num_running_each, scheduler.blocks, self._peak_blocks_each)
        return [
            GpuStats(
                running=running,
                used_blocks=_used(blocks),
                kept_blocks={pool: blocks.pools[pool].num_kept for pool in PoolId},
                peak_blocks=dict(peaks),
                weights_streamed_bytes=use.moved.weight_bytes,
                cache_loaded_bytes=use.moved.cache_bytes,
                regenerated_tokens=use.moved.regenerated_tokens,
                device_bytes=use.memory.used,
                peak_device_bytes=use.memory.peak,
                busy_seconds=use.busy_seconds,
            )
            for use, running, blocks, peaks in zip(*each, strict=True)
        ]


def _used(blocks: BlockManager) -> dict[PoolId, int]:
    """Blocks of one GPU that are held."""
    return {pool: blocks.pools[pool].num_used for pool in PoolId}


def _raise(peaks: dict[PoolId, int], used: Mapping[PoolId, int]) -> None:
    for pool, count in used.items():
        peaks[pool] = max(peaks[pool], count)
