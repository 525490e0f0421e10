"""What drafts cost under a plan, and why there are so many, in words.

A GPU second beside the bus goes first to prompts, then to drafts, then to recomputing, by what it saves:

- A prompt's token is computed sooner or later; until it is, a place of the batch is empty, which costs a token in each
  step. So the planner leaves chunks their size, and the scheduler drafts beside them.
- A drafted token that is accepted is worth a request's part of a step, `step / batch`. Of a model that streams that is
  tens to hundreds of times the time of its row, so drafts pay until hardly one in a hundred is accepted.
- Recomputing a token saves its bytes on the bus, which take a fifth of the time of its row, or less. It takes what
  drafts leave: the planner balances it against a step with drafts, and the scheduler counts those of the step before.

Where nothing streams, nobody waits for the bus. There a row costs what it computes, as soon as there are so many that
products compute longer than they read weights, and its attention to all that its request has cached; and a step with
drafts is laid out when the tokens before it are known, while the device waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hsrpc.draft.allocation import StepPrice
from hsrpc.plan.drafting import Drafting, DraftPlan, DraftTime
from hsrpc.plan.plan import Plan, StepPrediction
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import PoolId

_MANY_ROWS = 8192
"""So many rows compute longer than they read weights."""


def plan_drafts(plan: Plan, sizes: ModelSizes, drafting: Drafting, *, is_given: bool) -> DraftPlan:
    """The price and the reason of what each request may draft, where drafts are wanted.

    `is_given`: so many were asked for; else the planner has chosen.
    """

    def step(tokens: int) -> StepPrediction:
        return predict_at(plan, sizes, plan.prediction.context, drafting=drafting._replace(tokens=tokens))

    none = step(0)
    if not drafting.tokens:
        return DraftPlan(reason=_why_off(plan, none, drafting.time))
    price = _price(plan, drafting, step)
    reason = _why_on(plan, price, none, step(drafting.tokens), is_given=is_given)
    return DraftPlan(drafting=drafting, price=price, reason=reason)


def _price(plan: Plan, drafting: Drafting, step: Callable[[int], StepPrediction]) -> StepPrice:
    """Lines through the GPU's time for few rows and for many, and what a step with any draft takes beyond them."""
    batch, many = plan.max_batch, math.ceil(_MANY_ROWS / plan.max_batch)
    none, one, two, some, more = map(step, (0, 1, 2, many, 2 * many))
    each = (more.gpu - some.gpu) / (many * batch)
    read = min(each, (two.gpu - one.gpu) / batch)
    row = each - read
    beyond = (some.gpu - one.gpu - read * (many - 1) * batch) / row if row else 0.0
    price = StepPrice(
        step_seconds=none.step,
        row_seconds=row,
        read_seconds=read,
        free_rows=max(0, int(many * batch - beyond)),
        spare_seconds=max(0.0, max(none.bus, none.launch) - none.gpu),
        token_seconds=max(0.0, two.boundary - one.boundary) if drafting.time.each else 0.0,
        max_rows=batch * drafting.tokens,
    )
    return replace(price, first_seconds=max(0.0, one.step - float(price.seconds(np.array(batch), 1))))


def _why_off(plan: Plan, none: StepPrediction, time: DraftTime) -> str:
    if not none.bus:
        found = (
            "off: model and cache are on the device, where a step with drafts is predicted to cost more than it gives"
        )
        first, later = (
            1e3 * float(seconds) for seconds in (time.seconds(plan.max_batch, 1), time.token(plan.max_batch))
        )
        alone = (
            f"the draft model alone takes {first:.3g} ms for a token of each, and {later:.3g} ms for every later one"
        )
        return f"{found}: {alone}" if first else found
    if plan.absorbs and plan.num_blocks[PoolId.HOST_ACTIVATION]:
        return "off: single queries attend to latents as they are stored, those of drafts to K and V that are rebuilt"
    return "off: the GPU is about as busy as the bus, or drafts would take the room of cached tokens"


def _why_on(plan: Plan, price: StepPrice, none: StepPrediction, chosen: StepPrediction, *, is_given: bool) -> str:
    asked = ", as asked" if is_given else ""
    limit = f"up to {_counted(chosen.drafts, 'token')} a request{asked}"
    if chosen.tokens_per_second < none.tokens_per_second:
        return f"{limit}, though that is predicted not to pay: {_changed(none, chosen)}"
    if price.num_free < plan.max_batch:
        return f"{limit}: {_changed(none, chosen)}"
    requests, uses = _counted(plan.max_batch, "request"), "uses" if plan.max_batch == 1 else "use"
    rows = f"{plan.max_batch:,} of {plan.max_batch + price.num_free:,} rows that the GPU computes in the time of a step"
    return f"{limit}: {requests} {uses} {rows}"


def _changed(none: StepPrediction, some: StepPrediction) -> str:
    times = f"a step takes {some.step * 1e3:.4g} ms in place of {none.step * 1e3:.4g} ms"
    return f"{times} for {some.tokens_per_request:.2f} tokens of each"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
