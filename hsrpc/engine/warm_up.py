"""The largest steps before the first client's request: kernels are compiled and loaded, and memory is seen to suffice.

Libraries load a kernel when its shape is first computed, which takes tens of milliseconds for each.
"""

from __future__ import annotations

from dataclasses import replace

from hsrpc.engine.startup import Components
from hsrpc.request import SamplingParams
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits

_NEW_TOKENS = 2
"""Output tokens of a request, beside drafted ones."""
_MAX_TOKENS = 16384
"""Prompt tokens of a warm-up step, at most."""


async def warm_up(components: Components, limits: SchedulerLimits) -> None:
    """Compute a step of prompts alone, one of prompts beside decoding, and decode steps; counters are as before.

    Where there may be drafts, all that decode have the longest.

    Raises:
        OutOfDeviceMemoryError: the device has not the memory for a step.
    """
    limits = replace(limits, shares_prefixes=False)  # all prompts are equal
    blocks, *others = components.new_blocks()
    scheduler = Scheduler(blocks, limits, (), others)
    new_tokens = min(_NEW_TOKENS + limits.max_draft_tokens, limits.max_model_len - 1)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    for tokens in (limits.max_idle_prefill_tokens, limits.max_prefill_tokens):
        for length in _prompts(tokens, limits, scheduler, new_tokens):
            number = scheduler.num_running + scheduler.num_waiting
            scheduler.add(Request(f"warm-up {number}", [0] * length, params, number, 0.0))
        await _step(components, scheduler)
    while await _step(components, scheduler):
        pass
    components.gpus.reset_counts()


def _prompts(tokens: int, limits: SchedulerLimits, scheduler: Scheduler, new_tokens: int) -> list[int]:
    """Lengths of prompts with `tokens` tokens on each GPU, as far as there is room for them."""
    gpus, blocks = len(scheduler.blocks), scheduler.blocks[0]  # all have as many, and as many run on each
    longest, room = limits.max_model_len, limits.max_batch - scheduler.num_running // gpus
    if limits.keeps_cache:  # there may be blocks for a window and a chunk only
        longest = min(longest, blocks.num_blocks * limits.block_size)
    length = max(1, min(tokens, longest - new_tokens))
    if limits.keeps_cache:
        room = min(room, blocks.num_free // -(-(length + new_tokens) // limits.block_size))
    return [length] * (min(min(tokens, _MAX_TOKENS) // length, room) * gpus)


async def _step(components: Components, scheduler: Scheduler) -> bool:
    """False: there is none left. Requests go on as they are drafted."""
    for request, max_tokens in scheduler.draft_candidates():
        request.draft = [0] * max_tokens
    scheduled = scheduler.schedule(0.0)
    if scheduled is None:
        return False
    await components.gpus.execute(components.gpus.assemble(scheduled))
    scheduler.commit(scheduled.step_id, [0] * len(scheduled.sampling), 0.0)
    return True
