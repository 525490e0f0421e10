"""A short request before the first client's: kernels are compiled and loaded, and memory is seen to suffice."""

from __future__ import annotations

from hsrpc.core.blocks import BlockManager
from hsrpc.core.request import Request, SamplingParams
from hsrpc.core.scheduler import Scheduler, SchedulerLimits
from hsrpc.engine.startup import Parts

_PROMPT_TOKENS = 40
_NEW_TOKENS = 3


async def warm_up(parts: Parts, limits: SchedulerLimits) -> None:
    """Compute a prompt and a few tokens behind it; counters are as before.

    Raises:
        OutOfDeviceMemoryError: the device has not the memory for a step.
    """
    scheduler = Scheduler(BlockManager(parts.plan.num_blocks), limits, ())
    length = min(_PROMPT_TOKENS, limits.max_model_len - 1)
    params = SamplingParams(temperature=0.0, max_tokens=_NEW_TOKENS, ignore_eos=True)
    scheduler.add(Request("warm-up", [0] * length, params, 0, 0.0))
    while (step := scheduler.schedule(0.0)) is not None:
        sampled = await parts.executor.execute(step) or []
        scheduler.commit(step, [None if item.failed else item.token_id for item in sampled], 0.0)
    parts.prefetcher.streamed_bytes = 0
    parts.cache.loaded_bytes = parts.cache.regenerated_tokens = 0
