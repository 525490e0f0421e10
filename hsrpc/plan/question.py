"""What a plan answers: a model in several formats, a machine, and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.default_context import planner_with_context
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

    def answer(self, choose_plan: Callable[[Planner], Plan] = Planner.plan) -> tuple[Planner, Plan]:
        """The choice of formats with the fastest plan, of those that fit; the first one, where they are equal.

        Raises:
            ConfigError: none fits.
        """
        budgets, hardware = self.machine.budgets(self.config), self.machine.hardware
        config = self.config.of_one_gpu
        found: list[tuple[Planner, Plan]] = []
        errors: list[ConfigError] = []
        for sizes in self.choices:
            try:
                planner = planner_with_context(sizes, budgets, hardware, config)
                found.append((planner, choose_plan(planner)))
            except ConfigError as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return max(found, key=lambda each: each[1].prediction.mean_tokens_per_second)
