"""What a plan lets its users expect: how fast with how many requests, and how long until a first token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.plan import Plan, StepPrediction
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ModelSizes
from hsrpc.plan.step_time import Traffic

_BATCH_GROWTH = 4
"""Batch sizes of a table: 1, 4, 16 and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """Seconds from a request's arrival to its first token; an estimate, where steps are predicted."""

    prompt: int
    """Tokens."""
    idle: float
    """Nobody else is served."""
    loaded: float
    """All places are taken by requests that decode, and the request is first in the queue."""


def rates_by_batch(plan: Plan, sizes: ModelSizes) -> list[StepPrediction]:
    """Decode steps of 1, 4, 16 and so on requests of the expected length, up to the plan's batch."""
    context = plan.prediction.context
    return [predict_at(plan, sizes, context, batch) for batch in _batches(plan.max_batch)]


def _batches(most: int) -> list[int]:
    found, size = [], 1
    while size < most:
        found.append(size)
        size *= _BATCH_GROWTH
    return [*found, most]


def first_token(plan: Plan, sizes: ModelSizes, traffic: Traffic) -> FirstToken:
    """Time to first token of a prompt of the expected length."""
    return FirstToken(
        prompt=traffic.prompt,
        idle=_idle(plan, sizes, traffic.prompt),
        loaded=_loaded(plan, traffic),
    )


def longest_step(plan: Plan, sizes: ModelSizes) -> float:
    """Seconds of the longest step, at the expected context: with prompt tokens beside decoding, or as many alone."""
    return max(plan.prediction.longest_step, _idle(plan, sizes, plan.max_idle_prefill_tokens))


def _idle(plan: Plan, sizes: ModelSizes, prompt: int) -> float:
    """Steps of prompt tokens alone, as few as the plan allows, of as many tokens each.

    The guard's case of prompts on an H200 takes 0.306 s a step; this gives 0.286 s for as many tokens.
    """
    steps = math.ceil(prompt / plan.max_idle_prefill_tokens)
    tokens, layers, hardware = prompt / steps, sizes.num_layers, plan.hardware
    times, mini_batches = LayerTimes(sizes, hardware), math.ceil(prompt / steps / plan.buffers.queries)
    bus = sum(layer.bus_bytes for layer in plan.placed) / hardware.load_bandwidth
    launch = hardware.prompt_launch_time
    if bus:
        bus += layers * mini_batches * hardware.handover_time
        launch += hardware.hop_time
    each = max(float(times.forward(tokens, mini_batches)), tokens * times.prompt_token(prompt / 2))
    traffic = sum(layer.decode_traffic for layer in plan.placed) + sum(plan.expert_traffic)
    decoding = traffic / hardware.memory_bandwidth
    gpu = layers * each + decoding + float(times.head(1))
    # A mini-batch loads while the one before it computes: the first load or the last compute overlaps nothing.
    alone = min(bus, gpu) / (layers * mini_batches)
    experts = 0.0 if plan.demand is None else float(layers * times.on_demand(tokens, plan.demand.missed, mini_batches))
    work = max(
        max(bus, float(times.gather_weights(plan.gathered_bytes)), gpu) + experts, layers * mini_batches * launch
    )
    step = work + alone + hardware.boundary_time + hardware.request_time
    return steps * step


def _loaded(plan: Plan, traffic: Traffic) -> float:
    """Until a place is free, at least half of the step that runs; then steps with a chunk of the prompt beside."""
    predicted = plan.prediction
    until_free = max(0.5, traffic.output / (predicted.batch + 1))
    part = min(1.0, traffic.prompt / plan.max_prefill_tokens)
    with_chunk = predicted.step + part * (predicted.longest_step - predicted.step)
    chunks = math.ceil(traffic.prompt / plan.max_prefill_tokens)
    return until_free * predicted.mean_step + chunks * max(predicted.mean_step, with_chunk)
