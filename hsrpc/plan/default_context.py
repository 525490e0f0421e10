"""How long a request may be where nobody says: as the model's positions allow, as far as that hardly costs anything."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.drafting import NO_DRAFT_TIME, DraftTime
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import MODEST_CONTEXT, Planner
from hsrpc.plan.sizes import ModelSizes

_KEPT = 0.95
"""A longer context must leave this part of the predicted throughput: room for one long request is taken from others."""


def planner_with_context(
    sizes: ModelSizes, budgets: Budgets, hardware: Hardware, config: EngineConfig, draft_time: DraftTime = NO_DRAFT_TIME
) -> Planner:
    """The planner with the context given; else with the model's own, its half and so on, the first that fits well.

    That is: within the budgets, at hardly less throughput than with MODEST_CONTEXT, the last one to be taken.
    """
    modest = Planner(sizes, budgets, hardware, config, draft_time)
    if config.max_model_len is not None or sizes.context_length <= MODEST_CONTEXT or not modest.fits():
        return modest
    with suppress(ConfigError):
        least = _KEPT * modest.plan().prediction.mean_tokens_per_second
        for length in _halves(sizes.context_length):
            planner = Planner(sizes, budgets, hardware, replace(config, max_model_len=length), draft_time)
            if planner.fits() and planner.plan().prediction.mean_tokens_per_second >= least:
                return planner
    return modest


def _halves(length: int) -> list[int]:
    """The length, its half, and so on, while they are more than MODEST_CONTEXT."""
    return [length >> i for i in range(length.bit_length()) if length >> i > MODEST_CONTEXT]
