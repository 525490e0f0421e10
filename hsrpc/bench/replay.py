"""Drafts by replay: the model's own output is recorded, then drafted with a given rate of error, beside the formula."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import starmap
from statistics import fmean, median
from typing import NamedTuple

from hsrpc.bench.run import BenchError
from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.config import EngineConfig
from hsrpc.draft.drafter import Wanted
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine.engine import Engine
from hsrpc.plan.drafting import NOTHING_DRAFTED, Drafting
from hsrpc.plan.plan import Plan
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import SamplingParams

_WARM_UP_STEPS = 1
"""Whole steps of a setting that are not measured."""
_FIRST_TOKEN = 10
"""Id in a vocabulary: those before it may have a meaning."""
_CERTAIN = 100.0
"""Added to the logit of a token that is to be sampled whatever the others are."""
_MAX_RUNS = 8
"""Times that the requests are repeated for a setting, at most: long drafts end them in a few steps."""


class _Step(NamedTuple):
    record: StepRecord
    accepted_before: int
    """Drafted tokens that steps before it had accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Steps in which all requests decode and draft equally many tokens, measured and predicted."""

    drafts: int
    """Tokens that each request drafts."""
    acceptance: float
    """Probability that a drafted token is the right one."""
    num_steps: int
    step_seconds: float
    """Median."""
    step_times: tuple[float, ...]
    tokens_per_request: float
    """Tokens of a step for each request, on average: tau."""
    tokens_per_second: float
    limit_seconds: float
    """Median of the steps' limits: the longer of bus and GPU."""
    limit_tokens_per_second: float
    """With as many tokens of each request, at the limit."""
    predicted_step_seconds: float
    predicted_tokens_per_request: float
    predicted_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """All settings on one engine."""

    model: str
    device: str
    policy: str
    resident_share: float
    batch: int
    context: int
    """Tokens that each request holds on average in the measured steps."""
    max_draft_tokens: int
    drafts: str
    """The plan's reason for so many."""
    settings: tuple[Replayed, ...]
    """The first drafts nothing."""


class _Replays:
    """Drafts as the setting of the moment says."""

    def __init__(self) -> None:
        self._tokens = 0
        self._drafter = ReplayDrafter({})

    def begin(self, outputs: Mapping[tuple[int, ...], Sequence[int]], drafting: Drafting, seed: int) -> None:
        """From now on; other seeds err at other places."""
        self._tokens = drafting.tokens
        self._drafter = ReplayDrafter(outputs, drafting.acceptance, seed)

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        return [draft[: self._tokens] for draft in self._drafter.draft(wanted)]

    def forget(self, request_ids: Collection[str]) -> None:
        self._drafter.forget(request_ids)


class _Recorder:
    """Keeps the steps of an engine."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.accepted: Callable[[], int] = lambda: 0

    def __call__(self, record: StepRecord) -> None:
        self.steps.append(_Step(record, self.accepted()))


async def replay(
    config: EngineConfig,
    settings: Sequence[Drafting],
    *,
    prompt: int,
    output: int,
    steps: int,
    on_setting: Callable[[Replayed], object] = lambda _: None,
) -> ReplayResult:
    """Measure `settings` on one engine, with as many requests as it runs at once.

    Each has `prompt` prompt tokens, computed once, and generates `output`; at least `steps` steps are measured of each
    setting, as far as a few repetitions have so many. `on_setting` is told each result.

    Raises:
        BenchError: some setting has no step in which all draft so many.
        ConfigError: as an engine.
    """
    recorder, drafter = _Recorder(), _Replays()
    async with Engine(config, observe=recorder, drafter=drafter) as engine:
        recorder.accepted = lambda: engine.stats().accepted_tokens
        workload = make_workload(
            Lengths.UNIFORM,
            count=engine.plan.max_batch,
            prompt=prompt,
            output=output,
            vocab_size=engine.spec.vocab_size,
        )
        outputs = await _outputs(engine, workload.prompts, output)
        found = [_summary(engine.plan, engine.spec.sizes, NOTHING_DRAFTED, _whole(engine, recorder, 0))]
        on_setting(found[0])
        for drafting in settings:
            chosen: list[_Whole] = []
            for run in range(_MAX_RUNS):
                if len(chosen) >= steps:
                    break
                recorder.steps.clear()
                drafter.begin(outputs, drafting, run)
                await _outputs(engine, workload.prompts, output)
                chosen += _whole(engine, recorder, drafting.tokens)
            found.append(_summary(engine.plan, engine.spec.sizes, drafting, chosen))
            on_setting(found[-1])
        plan = engine.plan
        return ReplayResult(
            model=engine.spec.name,
            device=engine.device,
            policy=plan.policy.value,
            resident_share=plan.resident_share,
            batch=plan.max_batch,
            context=prompt + output // 2,
            max_draft_tokens=plan.max_draft_tokens,
            drafts=plan.drafts.reason,
            settings=tuple(found),
        )


async def _outputs(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The output of each prompt, all at once: one token again and again, another for each.

    Random weights leave the most probable tokens so close that rounding decides, and it differs with the rows of a
    product. So the output is made certain, for what is known to be right to be right.
    """

    async def output(number: int, prompt: Sequence[int]) -> tuple[int, ...]:
        bias = {_FIRST_TOKEN + number % (engine.spec.vocab_size - _FIRST_TOKEN): _CERTAIN}
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logit_bias=bias)
        async with aclosing(engine.generate(prompt, params)) as deltas:
            return tuple([token_id async for delta in deltas for token_id in delta.token_ids])

    found = await asyncio.gather(*starmap(output, enumerate(prompts)))
    return dict(zip(map(tuple, prompts), found, strict=True))


class _Whole(NamedTuple):
    record: StepRecord
    accepted: int


def _whole(engine: Engine, recorder: _Recorder, drafts: int) -> list[_Whole]:
    """The steps in which all requests decode and draft so many tokens, without the first."""
    after = [step.accepted_before for step in recorder.steps[1:]] + [engine.stats().accepted_tokens]
    batch = engine.plan.max_batch
    whole = [
        _Whole(record, accepted - before)
        for (record, before), accepted in zip(recorder.steps, after, strict=True)
        if not record.prefill_tokens and record.decode_tokens == batch and record.drafted_tokens == batch * drafts
    ]
    return whole[_WARM_UP_STEPS:]


def _summary(plan: Plan, sizes: ModelSizes, drafting: Drafting, steps: Sequence[_Whole]) -> Replayed:
    if not steps:
        found = f"no step in which {plan.max_batch} requests draft {drafting.tokens} tokens each"
        raise BenchError(f"{found}; give more output tokens, or a plan with room for them")
    batch, seconds = plan.max_batch, [step.record.seconds for step in steps]
    limits = (
        roofline(step.record, sizes, plan.hardware, absorbs=plan.absorbs, gathered_bytes=plan.gathered_bytes)
        for step in steps
    )
    limit = median(each.seconds for each in limits)
    tokens = 1 + fmean(step.accepted for step in steps) / batch
    context = round(fmean(step.record.held_tokens for step in steps) / batch)
    predicted = predict_at(plan, sizes, context, drafting=drafting)
    return Replayed(
        drafts=drafting.tokens,
        acceptance=drafting.acceptance,
        num_steps=len(steps),
        step_seconds=median(seconds),
        step_times=tuple(seconds),
        tokens_per_request=tokens,
        tokens_per_second=batch * tokens * len(steps) / sum(seconds),
        limit_seconds=limit,
        limit_tokens_per_second=batch * tokens / limit,
        predicted_step_seconds=predicted.step,
        predicted_tokens_per_request=predicted.tokens_per_request,
        predicted_tokens_per_second=predicted.tokens_per_second,
    )
