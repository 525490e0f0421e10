"""Counters of a running engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsrpc.schedule.blocks import PoolId


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One moment; what only grows counts since the start."""

    queued: int
    queued_tokens: int
    """Prompt tokens of those that wait, and what those that gave way had generated."""
    running: int
    used_blocks: Mapping[PoolId, int]
    """Blocks in use now."""
    peak_blocks: Mapping[PoolId, int]
    """Blocks in use at once, at most, since the start."""
    steps: int
    step_seconds: float
    prompt_tokens: int
    """Tokens of all prompts that were submitted."""
    generated_tokens: int
    preemptions: int
    weights_streamed_bytes: int
    cache_loaded_bytes: int
    regenerated_tokens: int
    """Rows of K and V rebuilt from activations, each layer counted."""
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
    peak_device_bytes: int
    """Bytes of device memory at the peak, as the allocator counts them; 0 on the CPU."""
