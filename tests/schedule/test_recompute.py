"""Who keeps no cache: as many as balance bus and GPU, never more than planned, and nobody who could outgrow a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockKind, PoolId
from hsrpc.schedule.recompute import BALANCE, RecomputeLimits, RecomputePolicy
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import RowCosts
from hsrpc.schedule.windows import NO_WINDOWS, LayerWindows

COSTS = RowCosts(load_kv=2.0, load_activation=1.0, regenerate=0.25, compute=1.5)
LIMITS = RecomputeLimits(tokens=1000, weights=100.0)
BLOCK = 4


def make_request(number: int, num_blocks: int, pool: PoolId = PoolId.HOST_ACTIVATION, output: int = 8) -> Request:
    """One that decodes, its blocks full but for the newest token."""
    request = Request(str(number), range(num_blocks * BLOCK), SamplingParams(max_tokens=output), number, 0.0)
    request.token_ids.append(0)
    request.num_computed = num_blocks * BLOCK
    for index in range(num_blocks):
        request.blocks.append(pool, 100 * number + index)
    return request


def give_up(request: Request) -> None:
    del request.blocks.pools[:], request.blocks.indices[:]
    request.num_computed, request.is_uncached = 0, True


def recomputing(
    limits: RecomputeLimits = LIMITS, max_queries: int = 64, windows: LayerWindows = NO_WINDOWS
) -> RecomputePolicy:
    return RecomputePolicy(limits, COSTS, block_size=BLOCK, max_queries=max_queries, windows=windows)


def times(requests: Sequence[Request], weights: float) -> tuple[float, float]:
    """Seconds of bus and GPU for a layer, by definition."""
    bus, gpu = weights, 0.0
    for request in requests:
        if request.is_uncached:
            gpu += 1.5 * request.num_tokens
            continue
        for pool in request.blocks.pools:
            bus += BLOCK * {PoolId.HOST_KV: 2.0, PoolId.HOST_ACTIVATION: 1.0}.get(PoolId(pool), 0.0)
            gpu += BLOCK * 0.25 * (PoolId(pool).kind is BlockKind.ACTIVATION)
    return bus, gpu


def test_as_many_give_up_as_the_gpu_has_time_for():
    """Four long ones, of 16 s each on the bus and 25 s on the GPU; no fifth, but a short one has room."""
    running = [make_request(number, 4) for number in range(7)] + [make_request(7, 2)]
    chosen = [*running[:4], running[7]]
    assert recomputing().choose(running, 0).giving_up == chosen
    for request in chosen:
        give_up(request)
    assert times(running, LIMITS.weights) == (148.0, 127.5)
    assert 127.5 <= BALANCE * 148.0 < 127.5 + 21.5 + BALANCE * 16
    assert recomputing().choose(running, 0).giving_up == []


def test_the_planned_tokens_are_not_exceeded():
    """A request counts with the tokens that it has on average until it ends."""
    running = [make_request(number, 4) for number in range(4)]
    mean = (17 + 24) // 2
    assert recomputing(replace(LIMITS, tokens=2 * mean)).choose(running, 0).giving_up == running[:2]
    assert recomputing(replace(LIMITS, tokens=2 * mean - 1)).choose(running, 0).giving_up == running[:1]


def test_prompts_come_first():
    """The GPU's time for the prompts of the step is not there for others."""
    running = [make_request(number, 4) for number in range(7)]
    assert recomputing().choose(running, 30).giving_up == running[:3]
    assert recomputing().choose(running, 100).giving_up == []


@pytest.mark.parametrize("pool", [PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION])
def test_what_lies_on_the_device_is_kept(pool: PoolId):
    """It costs the bus nothing."""
    assert recomputing().choose([make_request(0, 4, pool)], 0).giving_up == []


def test_what_lies_before_the_window_is_not_loaded_anyway():
    """Seven requests with 16 cached tokens each: a window of 5 sees one block: 4 s less each, in place of 16 s."""
    running = [make_request(number, 4) for number in range(7)]
    limits, seen = replace(LIMITS, weights=0.0), recomputing(LIMITS, windows=LayerWindows((5,)))
    assert times(running, 0.0) == (112.0, 28.0)
    assert recomputing(limits).choose(running, 0).giving_up == running[:1]
    assert recomputing(limits, windows=LayerWindows((5,))).choose(running, 0).giving_up == []
    cached = [seen._cached(request) for request in running]
    assert cached == [(4.0, 1.0)] * 7
    for request in running:  # it makes no difference whether they are freed
        del request.blocks.pools[:3], request.blocks.indices[:3]
        request.blocks.first = 3
    assert [seen._cached(request) for request in running] == cached


def test_each_layer_loads_what_its_own_window_shows():
    """One of four layers sees 16 tokens and three see 4: on average 7 s of the bus and 1.75 s of the GPU a request."""
    running = [make_request(number, 4) for number in range(7)]
    enough = (5 * 1.75 + 2 * 1.5 * 17) * 8 / 7 - 5 * 7.0  # seconds of weights beside which two are computed anew
    for weights, count in ((enough - 0.01, 1), (enough + 0.01, 2)):
        policy = recomputing(replace(LIMITS, weights=weights), windows=LayerWindows((5, 5, None, 5)))
        assert policy.choose(running, 0).giving_up == running[:count]


def test_a_request_that_would_outgrow_a_mini_batch_keeps_its_cache():
    """It must fit to its end, whatever it has now."""
    short, long, endless = make_request(0, 4), make_request(1, 4, output=49), make_request(2, 4)
    endless.max_total_tokens = 256
    assert recomputing(max_queries=64).choose([endless, long, short], 0).giving_up == [short]
    assert recomputing(max_queries=65).choose([endless, long, short], 0).giving_up == [long, short]


def test_a_prompt_is_computed_first():
    """Only those that decode give up what they have."""
    request = make_request(0, 4)
    request.num_computed = 8
    assert recomputing().choose([request], 0).giving_up == []
    request.num_computed = 16
    del request.token_ids[-1]
    assert recomputing().choose([request], 0).giving_up == []


def test_the_last_takes_its_cache_back_when_the_bus_has_time():
    """Without the weights' time the GPU takes longer than the bus."""
    running = [make_request(number, 4) for number in range(4)]
    for request in running[1:3]:
        give_up(request)
    assert recomputing().choose(running, 0).taking_back == []
    assert recomputing(replace(LIMITS, weights=0.0)).choose(running, 0).taking_back == [running[2], running[1]]


def test_forced_requests_give_up_whatever_it_costs():
    """For measurements: as many as are asked for, and nobody takes anything back."""
    limits = RecomputeLimits(tokens=1000, weights=0.0, is_forced=True)
    running = [make_request(0, 4, PoolId.DEVICE_KV), make_request(1, 4)]
    assert recomputing(limits).choose(running, 0).giving_up == running
    for request in running:
        give_up(request)
    assert recomputing(limits).choose(running, 0).taking_back == []


@given(
    blocks=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(PoolId), st.booleans()), max_size=12),
    weights=st.sampled_from((0.0, 3.0, 50.0, 1000.0)),
    tokens=st.sampled_from((0, 20, 100, 10_000)),
)
def test_it_settles(blocks: list[tuple[int, PoolId, bool]], weights: float, tokens: int):
    """Whoever gives up keeps within the balance, and nobody who just gave up is to take back what it had."""
    running = [make_request(number, count, pool) for number, (count, pool, _) in enumerate(blocks)]
    for request, (_, _, has_given_up) in zip(running, blocks, strict=True):
        if has_given_up:
            give_up(request)
    chooser = recomputing(RecomputeLimits(tokens=tokens, weights=weights))
    given_up = chooser.choose(running, 0).giving_up
    for request in given_up:
        assert not request.is_uncached
        give_up(request)
    bus, gpu = times(running, weights)
    assert not given_up or gpu <= BALANCE * bus
    assert (chooser.choose(running, 0).taking_back == []) == (gpu <= bus or not any(r.is_uncached for r in running))
