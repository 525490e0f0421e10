"""How the experts of a mixture come to the device under a plan, and for how many requests the other way is faster."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from hsrpc.config import ExpertLoading
from hsrpc.errors import ConfigError
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import MAX_BATCH
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.question import Question
from hsrpc.plan.sizes import ModelSizes

_GROWTH = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutlook:
    """What is to be expected of experts."""

    loading: ExpertLoading
    """How they come: never `auto`."""
    count: int
    """Experts of a layer, at most."""
    slots: int
    """Those of a layer that lie on the device at once, where they come on demand; else 0."""
    hit_rate: float
    """Part of the experts needed that is in a slot, where all are as likely: routers that repeat theirs hit more."""
    streaming_from: int | None
    """Requests at once, on all GPUs, from which on a step is no longer where all stream. None: no plan of the other
    kind fits, or there is no such number."""


def expert_outlook(question: Question, sizes: ModelSizes, plan: Plan) -> ExpertOutlook | None:
    """None: the model has no experts. `sizes` are those of the question's that the plan is for.

    Plans once more, with the experts loaded the other way, and compares steps of the expected length. To several GPUs
    they do not come on demand: the other way is that of one of them then.
    """
    counts = [layer.experts.count for layer in sizes.layers if layer.experts is not None]
    if not counts:
        return None
    demand = plan.demand
    return ExpertOutlook(
        loading=ExpertLoading.STREAM if demand is None else ExpertLoading.DEMAND,
        count=max(counts),
        slots=0 if demand is None else demand.slots,
        hit_rate=0.0 if demand is None else demand.hit_rate,
        streaming_from=_streaming_from(question, sizes, plan),
    )


def _streaming_from(question: Question, sizes: ModelSizes, plan: Plan) -> int | None:
    other = ExpertLoading.DEMAND if plan.demand is None else ExpertLoading.STREAM
    config = replace(question.config, gpus=1, experts=other, max_model_len=plan.max_model_len)
    choices = tuple(each.on_gpus(1) for each in question.choices)
    try:
        planner, found = replace(question, choices=choices, config=config).answer()
    except ConfigError:
        return None
    both = [(plan, sizes), (found, planner.sizes)]
    streaming, on_demand = both if plan.demand is None else both[::-1]
    context, before, batch = plan.prediction.context, 0, 1

    def is_as_fast(batch: int) -> bool:
        of_each = -(-batch // plan.num_gpus)
        return predict_at(*streaming, context, of_each).step <= predict_at(*on_demand, context, batch).step

    while batch <= MAX_BATCH:
        if is_as_fast(batch):
            between = range(before + 1, batch + 1)
            return between[bisect_left(between, True, key=is_as_fast)]
        before, batch = batch, max(batch + 1, int(batch * _GROWTH))
    return None
