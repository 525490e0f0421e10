"""Counters of a running engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsrpc.schedule.blocks import PoolId


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStats:
    """What is one GPU's; one moment; what only grows counts since the start."""

    running: int = 0
    """Requests that run there."""
    used_blocks: Mapping[PoolId, int]
    """Blocks in use now."""
    kept_blocks: Mapping[PoolId, int]
    """Blocks that nobody uses, and whose content is kept."""
    peak_blocks: Mapping[PoolId, int]
    """Blocks in use at once, at most, since the start."""
    weights_streamed_bytes: int = 0
    cache_loaded_bytes: int = 0
    regenerated_tokens: int = 0
    """Rows of K and V rebuilt from activations, each layer counted."""
    device_bytes: int = 0
    """Bytes of device memory in use now, as the allocator counts them; 0 on the CPU."""
    peak_device_bytes: int = 0
    """Most of them at once."""
    busy_seconds: float = 0.0
    """Time in which it did its parts of steps; in what is left of the steps' time it was done and others were not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One moment; what only grows counts since the start."""

    queued: int
    queued_tokens: int
    """Prompt tokens of those that wait, and what those that gave way had generated."""
    gpus: Sequence[GpuStats]
    """Each GPU by itself, by its number."""
    peak_blocks: Mapping[PoolId, int]
    """Blocks of all GPUs in use at once, at most, since the start."""
    steps: int
    step_seconds: float
    prompt_tokens: int
    """Tokens of all prompts that were submitted."""
    generated_tokens: int
    preemptions: int
    recomputed_tokens: int = 0
    """Tokens that steps recomputed because their requests keep no cache; a request's newest token is not counted."""
    cached_tokens: int = 0
    """Tokens of requests that were found in blocks of others when they were admitted, and not computed."""
    drafted_tokens: int = 0
    """Tokens that were drafted, and checked by steps."""
    accepted_tokens: int = 0
    """Those of them that were the output's."""
    expert_hits: int = 0
    """Experts that steps needed and found in their slots, each layer counted; none where they do not come on demand."""
    expert_loads: int = 0
    """Experts that crossed the bus because steps needed them."""
    expert_loaded_bytes: int = 0
    """Bytes of these; `weights_streamed_bytes` has them too."""

    @property
    def running(self) -> int:
        return sum(gpu.running for gpu in self.gpus)

    @property
    def used_blocks(self) -> dict[PoolId, int]:
        """Blocks of all GPUs in use now."""
        return {pool: sum(gpu.used_blocks[pool] for gpu in self.gpus) for pool in PoolId}

    @property
    def kept_blocks(self) -> dict[PoolId, int]:
        """Blocks of all GPUs that nobody uses, and whose content is kept."""
        return {pool: sum(gpu.kept_blocks[pool] for gpu in self.gpus) for pool in PoolId}

    @property
    def weights_streamed_bytes(self) -> int:
        return sum(gpu.weights_streamed_bytes for gpu in self.gpus)

    @property
    def cache_loaded_bytes(self) -> int:
        return sum(gpu.cache_loaded_bytes for gpu in self.gpus)

    @property
    def regenerated_tokens(self) -> int:
        """Rows of K and V rebuilt from activations, each layer counted."""
        return sum(gpu.regenerated_tokens for gpu in self.gpus)

    @property
    def peak_device_bytes(self) -> int:
        """Bytes of device memory at the peak, of the GPU that used most."""
        return max(gpu.peak_device_bytes for gpu in self.gpus)
