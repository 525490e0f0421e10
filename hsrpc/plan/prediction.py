"""What a plan predicts for requests of another length than those it was made for."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from hsrpc.plan.drafting import Drafting
from hsrpc.plan.plan import Plan, StepPrediction
from hsrpc.plan.simulated_step import simulated_step
from hsrpc.plan.sizes import ModelSizes
from hsrpc.plan.step_time import Candidates, StepModel, StepTimes, Traffic
from hsrpc.schedule.blocks import PoolId, Tier


def predict_at(
    plan: Plan,
    sizes: ModelSizes,
    context: int,
    num_requests: int | None = None,
    drafting: Drafting | None = None,
    *,
    hit_rate: float | None = None,
) -> StepPrediction:
    """A decode step of `num_requests` (default: the whole batch) with `context` cached tokens each.

    No prompts come in: `prefill` is 0, and `mean_step` is `step`. `drafting` None is the plan's. `hit_rate`: part of
    the experts on demand that a step finds on the device; None: as many as lie there, where all are as likely.
    """
    shared = min(plan.shared_prefix, context)
    traffic = Traffic(context=context, prompt=0, output=1, longest=plan.max_model_len, shared=shared)
    found = predict_traffic(plan, sizes, traffic, num_requests, drafting, hit_rate=hit_rate)
    return replace(found, mean_step=found.step)


def predict_traffic(
    plan: Plan,
    sizes: ModelSizes,
    traffic: Traffic,
    num_requests: int | None = None,
    drafting: Drafting | None = None,
    *,
    hit_rate: float | None = None,
) -> StepPrediction:
    """A step of `num_requests` (default: the whole batch) of another traffic than the plan's, prompts coming in.

    `drafting` and `hit_rate` as `predict_at` has them.
    """
    batch, context = num_requests or plan.max_batch, traffic.context
    drafts, acceptance, time = plan.drafts.drafting if drafting is None else drafting
    traffic = replace(traffic, acceptance=acceptance, draft_time=time)
    model = StepModel(sizes, plan.hardware, traffic)
    lengths = context, max(context, traffic.at_end)
    on_device, at_end = (_on_device(plan, sizes, batch, tokens, traffic.shared) for tokens in lengths)
    rebuilding = 1 - len(plan.kv_layers) / sizes.num_layers
    candidate = Candidates(
        batch=np.asarray(float(batch)),
        streamed=sum(layer.bus_bytes for layer in plan.placed) / sizes.num_layers,
        from_buses=sum(layer.num_others * layer.bus_bytes for layer in plan.placed) / sizes.num_layers,
        from_devices=sum(layer.num_others * layer.spread_bytes for layer in plan.placed) / sizes.num_layers,
        decode_traffic=sum(layer.decode_traffic for layer in plan.placed) / sizes.num_layers,
        expert_traffic=sum(plan.expert_traffic) / sizes.num_layers,
        spared_traffic=sum(layer.spared_traffic for layer in plan.placed) / sizes.num_layers,
        on_demand=float(plan.demand is not None),
        missed=_missed(plan, hit_rate),
        on_device=on_device,
        on_device_at_end=at_end,
        device_share=rebuilding * _share(plan, Tier.DEVICE),
        host_share=rebuilding * _share(plan, Tier.HOST),
        recomputed=0.0 if plan.keeps_cache else 1.0,
        chunk=plan.max_prefill_tokens,
        prompt_queries=max(1, plan.buffers.queries - plan.max_batch * (1 + plan.max_draft_tokens)),
        rows=plan.buffers.activation_rows if plan.absorbs and not drafts else plan.buffers.rows,
        absorbs=plan.absorbs,
        drafts=drafts,
    )
    fits = context <= plan.buffers.queries  # a request that keeps no cache is part of one mini-batch
    part = fits * plan.recompute.tokens / (batch * context)
    if plan.recompute.is_forced:
        candidate = replace(candidate, recomputed=min(1.0, part))
    elif part:
        balanced = model.balanced_recompute(candidate, min(1.0 - on_device, part))
        candidate = replace(candidate, recomputed=balanced)
    closed = as_prediction(batch, context, drafts, model.predict(candidate))
    return simulated(plan, sizes, closed, recomputes=bool(candidate.recomputed))


def _missed(plan: Plan, hit_rate: float | None) -> float:
    """Part of the experts that a step has to load."""
    if plan.demand is None:
        return 0.0
    return plan.demand.missed if hit_rate is None else 1 - hit_rate


def _on_device(plan: Plan, sizes: ModelSizes, batch: int, tokens: int, shared: int) -> float:
    """Part of the cached tokens that lies on the device, where `batch` requests have so many each, some in common."""
    held = batch * float(sizes.held_blocks(tokens, plan.block_size)) - (batch - 1) * (shared // plan.block_size)
    return min(1.0, sum(_blocks(plan, Tier.DEVICE)) / held)


def as_prediction(batch: int, context: int, drafts: int, times: StepTimes) -> StepPrediction:
    """One candidate's times, as plain numbers."""
    seconds = {item.name: float(getattr(times, item.name)) for item in fields(times)}
    mini_batches = round(seconds.pop("mini_batches"))
    return StepPrediction(batch=batch, context=context, drafts=drafts, mini_batches=mini_batches, **seconds)


def simulated(plan: Plan, sizes: ModelSizes, closed: StepPrediction, *, recomputes: bool) -> StepPrediction:
    """A step with the parts of `closed`, whose own time is that of the list which the engine will run.

    A search compares thousands of candidates by a closed form; what is told of the chosen one is its list's time. Where
    nothing crosses the bus, nor comes from other GPUs, there is nothing that takes turns. `recomputes`: some tokens of
    the step are recomputed.
    """
    if not closed.bus + closed.peers:
        return closed
    # The list's first and last mini-batch, beside which nothing runs, are in its own time.
    alone = min(closed.bus, closed.gpu) / (sizes.num_layers * closed.mini_batches)
    by_list = simulated_step(plan, sizes, closed, recomputes=recomputes)
    step = max(by_list, closed.launch + closed.experts) + max(0.0, closed.boundary - alone)
    return replace(
        closed, step=step, longest_step=max(step, closed.longest_step), mean_step=max(step, closed.mean_step)
    )


def _blocks(plan: Plan, tier: Tier) -> tuple[int, int]:
    """K and V, and activations."""
    if tier is Tier.DEVICE:
        return plan.num_blocks[PoolId.DEVICE_KV], plan.num_blocks[PoolId.DEVICE_ACTIVATION]
    return plan.num_blocks[PoolId.HOST_KV], plan.num_blocks[PoolId.HOST_ACTIVATION]


def _share(plan: Plan, tier: Tier) -> float:
    kv, activations = _blocks(plan, tier)
    return activations / max(1, kv + activations)
