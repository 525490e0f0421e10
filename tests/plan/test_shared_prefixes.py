"""Plans for requests that share their first tokens: blocks that are there once, bytes that cross once a mini-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsrpc.config import CachePolicy, EngineConfig, Placement
from hsrpc.errors import ConfigError
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.step_time import Candidates, StepModel, StepTimes
from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockManager
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler
from tests.plan.test_search import GIB, OPT, plan_for, scheduler_limits
from tests.plan.test_step_time import BATCH, CONTEXT, EVEN, LAYER, LAYERS, OUTPUT, PROMPT, SIZES, STREAMED, TRAFFIC

SHARED = 384


def predict(candidate: Candidates, shared: int = SHARED) -> StepTimes:
    return StepModel(SIZES, EVEN, replace(TRAFFIC, shared=shared)).predict(candidate)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_shared_crosses_and_is_rebuilt_once_a_mini_batch(share: float) -> None:
    """All on the host; attention reads it for each request, and the device copies it to each."""
    times, alone = predict(replace(STREAMED, host_share=share)), predict(replace(STREAMED, host_share=share), 0)
    assert times.mini_batches == alone.mini_batches > 1
    loaded = BATCH * (CONTEXT - SHARED) + times.mini_batches * SHARED
    row = LAYER.activation.num_bytes if share else LAYER.kv.num_bytes
    assert times.bus == pytest.approx(LAYERS * (LAYER.weight_bytes + loaded * row) / EVEN.load_bandwidth)
    assert times.regenerate == pytest.approx(share * LAYERS * loaded * LAYER.regenerate_flop / EVEN.gemm_rate)
    assert times.attention == alone.attention
    copied = (BATCH - 1) * SHARED * 2 * LAYER.kv.num_bytes
    assert times.gather == pytest.approx(LAYERS * copied / EVEN.memory_bandwidth)
    assert times.prefill == pytest.approx(alone.prefill * (PROMPT - SHARED) / PROMPT)


def test_a_prefix_on_the_device_does_not_cross() -> None:
    """It is what came first, and lies there if anything does; K and V are read where they are."""
    candidate = replace(STREAMED, on_device=0.5, on_device_at_end=0.5)
    times = predict(candidate)
    loaded = (BATCH * (CONTEXT - SHARED) + SHARED) / 2
    size = LAYER.weight_bytes + loaded * LAYER.activation.num_bytes
    assert times.bus == pytest.approx(LAYERS * size / EVEN.load_bandwidth)
    assert times.gather == 0


def test_more_requests_run_at_once_and_all_of_them_fit() -> None:
    """By the scheduler itself: as many as are planned, without one that gives way."""
    settings = {"expected_context": CONTEXT, "expected_output": OUTPUT, "max_model_len": 640}
    alone = plan_for(OPT["13b"], 24 * GIB, **settings)
    plan = plan_for(OPT["13b"], 24 * GIB, expected_shared_prefix=SHARED, **settings)
    assert plan.shared_prefix == SHARED
    assert plan.max_batch > alone.max_batch
    assert plan.prediction.tokens_per_second > 1.5 * alone.prediction.tokens_per_second
    assert plan.recompute.tokens == 0
    limits = replace(scheduler_limits(plan), shares_prefixes=True)
    scheduler = Scheduler(BlockManager(plan.num_blocks, plan.max_batch), limits, ())
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    for number in range(plan.max_batch):
        prompt = [*range(SHARED), *[number] * (CONTEXT - OUTPUT // 2 - SHARED)]
        scheduler.add(Request(str(number), prompt, params, number, 0.0))
    most = 0
    while (step := scheduler.schedule(0.0)) is not None:
        most = max(most, step.counts.requests)
        scheduler.commit(step.step_id, [1] * len(step.sampling), 0.0)
    assert most == plan.max_batch
    assert scheduler.preemptions == 0


def test_what_is_predicted_for_the_plans_own_context_is_what_the_plan_says() -> None:
    settings = {"expected_context": CONTEXT, "expected_shared_prefix": SHARED, "placement": Placement.HOST}
    plan = plan_for(OPT["13b"], 24 * GIB, max_batch=64, **settings)
    assert predict_at(plan, OPT["13b"], CONTEXT).bus == pytest.approx(plan.prediction.bus, rel=0.02)
    assert (
        predict_at(plan, OPT["13b"], CONTEXT).bus < predict_at(replace(plan, shared_prefix=0), OPT["13b"], CONTEXT).bus
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expected_shared_prefix": -1}, "give 0 or more"),
        ({"expected_shared_prefix": True}, "give 0 or more"),
        ({"expected_shared_prefix": 1.5}, "give 0 or more"),
        ({"expected_shared_prefix": 8, "prefix_cache": False}, "leave one of them out"),
        ({"expected_shared_prefix": 8, "cache_policy": CachePolicy.RECOMPUTE}, "nothing is cached"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        EngineConfig(**settings)
    assert raised.value.field == "expected_shared_prefix"
