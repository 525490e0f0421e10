"""The policies that are measured, and who makes the plan of each."""

from __future__ import annotations

from enum import StrEnum
from functools import partial

from benchmarks.policies.hcache import hcache_plan
from benchmarks.policies.kvpr import kvpr_plan
from hsrpc.config import CachePolicy
from hsrpc.engine.startup import ChoosePlan
from hsrpc.plan.planner import Planner


class Policy(StrEnum):
    """What is kept of the cached tokens, and by whose rule."""

    KV = "kv"
    ACTIVATION = "activation"
    AUTO = "auto"
    KVPR = "kvpr"
    HCACHE = "hcache"

    @property
    def paper(self) -> str | None:
        """Whose policy is emulated; None: it is one of hsrpc's own."""
        return {Policy.KVPR: "arXiv 2411.17089", Policy.HCACHE: "arXiv 2410.05004"}.get(self)

    @property
    def label(self) -> str:
        """Name for people: an emulation is named as one."""
        return f"{self} (emulated)" if self.paper else str(self)

    @property
    def cache_policy(self) -> CachePolicy:
        """The engine's; an emulation's plan sets its own."""
        return CachePolicy.AUTO if self.paper else CachePolicy(self)

    def choose_plan(self, hidden_layers: int | None = None) -> ChoosePlan:
        """Planning for an engine that follows this policy; `hidden_layers` overrides HCache's rule."""
        match self:
            case Policy.KVPR:
                return kvpr_plan
            case Policy.HCACHE:
                return partial(hcache_plan, hidden_layers=hidden_layers)
            case _:
                return Planner.plan
