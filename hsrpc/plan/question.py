"""What a plan answers: a model in several formats, a machine, and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.default_context import planner_with_context
from hsrpc.plan.drafting import NO_DRAFT_TIME, DraftTime
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that a plan follows from; where there are several GPUs it is one for each of them."""

    choices: tuple[ModelSizes, ...]
    """Sizes of the model in each choice of formats."""
    machine: Machine
    config: EngineConfig
    draft_model_bytes: int = 0
    """Device memory that a draft model takes, which is planned before; 0: there is none."""
    draft_time: DraftTime = NO_DRAFT_TIME
    """What it takes to draft."""

    def answer(self, choose_plan: Callable[[Planner], Plan] = Planner.plan) -> tuple[Planner, Plan]:
        """The choice of formats with the fastest plan, of those that fit; the first one, where they are equal.

        Raises:
            ConfigError: none fits.
        """
        hardware, config = self.machine.hardware, self.config.of_one_gpu
        budgets = replace(self.machine.budgets(self.config), draft_model=self.draft_model_bytes)
        found: list[tuple[Planner, Plan]] = []
        errors: list[ConfigError] = []
        for sizes in self.choices:
            try:
                planner = planner_with_context(sizes, budgets, hardware, config, self.draft_time)
                found.append((planner, choose_plan(planner)))
            except ConfigError as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return max(found, key=lambda each: each[1].prediction.mean_tokens_per_second)

    def choice_of(self, planner: Planner) -> int:
        """Number of the choice that a planner of the answer is for."""
        [choice] = [number for number, sizes in enumerate(self.choices) if sizes is planner.sizes]
        return choice
