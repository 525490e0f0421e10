"""What a plan makes of a batch: how long it takes, and what would make it faster."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsrpc.batch.count import Count
from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.advice import WORTH, Advice, advise
from hsrpc.plan.plan import Plan
from hsrpc.plan.prediction import predict_traffic
from hsrpc.plan.question import Question
from hsrpc.plan.sizes import ModelSizes
from hsrpc.plan.step_time import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests of a batch."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    longest: int
    """Tokens of the longest request, prompt and output."""
    shared_tokens: int = 0
    """Tokens of prompts that others begin with as well, but for those of one."""

    @property
    def shared(self) -> int:
        """First tokens that requests have in common, on average."""
        return min(self.prompt - 1, self.shared_tokens // max(1, self.requests - 1))

    @property
    def prompt(self) -> int:
        """Tokens of a prompt, on average."""
        return max(1, round(self.prompt_tokens / max(1, self.requests)))

    @property
    def output(self) -> int:
        """Tokens of an output, on average."""
        return max(1, round(self.output_tokens / max(1, self.requests)))

    @property
    def context(self) -> int:
        """Tokens that a request holds while it runs, on average."""
        return self.prompt + self.output // 2


def load_of(count: Count) -> Load:
    """The requests that were counted in an input."""
    return Load(
        requests=count.requests,
        prompt_tokens=count.prompt_tokens,
        output_tokens=count.output_tokens,
        longest=count.longest,
        shared_tokens=count.shared_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Predictions for a batch."""

    batch: int
    """Requests that run at once."""
    seconds: float
    """As the engine is set."""
    settings: dict[str, int]
    """Settings with which it would be planned for this load; empty: it hardly matters."""
    seconds_with_settings: float
    advice: list[Advice] | None
    """What would help beyond that, each with the settings; None: not asked for."""


def outlook(question: Question, sizes: ModelSizes, plan: Plan, load: Load, *, with_advice: bool) -> Outlook:
    """What is to be expected of `load` under `plan`, the answer to `question`. With advice it takes seconds."""
    batch = min(plan.max_batch, load.requests)
    traffic = Traffic(
        context=min(load.context, plan.max_model_len),
        prompt=load.prompt,
        output=load.output,
        longest=plan.max_model_len,
        shared=load.shared // plan.block_size * plan.block_size if question.config.prefix_cache else 0,
    )
    seconds = load.output_tokens / predict_traffic(plan, sizes, traffic, batch).mean_tokens_per_second
    settings, suited, suited_plan = _suited(question, sizes, plan, load)
    with_settings = seconds
    if settings:
        rate = predict_traffic(suited_plan, sizes, traffic, min(suited_plan.max_batch, load.requests))
        with_settings = load.output_tokens / rate.mean_tokens_per_second
        if with_settings > (1 - WORTH) * seconds:
            settings, with_settings = {}, seconds
    advice = advise(suited, sizes, suited_plan) if with_advice else None
    return Outlook(
        batch=batch,
        seconds=seconds,
        settings=settings,
        seconds_with_settings=with_settings,
        advice=advice,
    )


def _suited(question: Question, sizes: ModelSizes, plan: Plan, load: Load) -> tuple[dict[str, int], Question, Plan]:
    """Settings for the load in place of those that nobody has given, the question with them, and its answer."""
    wanted = {
        "max_model_len": min(plan.max_model_len, load.longest),
        "expected_context": load.context,
        "expected_output": load.output,
    }
    settings = {name: value for name, value in wanted.items() if getattr(question.config, name) is None}
    if load.shared >= plan.block_size and question.config.prefix_cache and not question.config.expected_shared_prefix:
        settings["expected_shared_prefix"] = load.shared
    config: EngineConfig = replace(question.config, **settings)  # type: ignore[arg-type]
    suited = replace(question, choices=(sizes,), config=config)
    try:
        _, suited_plan = suited.answer()
    except ConfigError:  # its budgets suit the plan that there is, and no other
        return {}, question, plan
    return settings, suited, suited_plan
