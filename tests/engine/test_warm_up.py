"""The steps before the first request: of prompts that the blocks hold."""

from __future__ import annotations

from dataclasses import replace

from hsrpc.engine.warm_up import _prompts
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.scheduler import Scheduler
from hsrpc.schedule.windows import LayerWindows
from tests.schedule.test_scheduler import LIMITS


def test_prompts_are_no_longer_than_the_blocks_hold():
    """Under a window a pool may have fewer blocks than a step's prompt tokens: a shorter prompt warms up all the same.

    Six blocks of four tokens, two of which are for output.
    """
    limits = replace(LIMITS, max_model_len=100, max_idle_prefill_tokens=60, windows=LayerWindows((5,)))
    scheduler = Scheduler(BlockManager({PoolId.DEVICE_KV: 6}), limits, [])
    assert _prompts(60, limits, scheduler, 2) == [22]
