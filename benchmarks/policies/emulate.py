"""Puts a policy's classes in the place of the engine's own, for engines that start meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from types import ModuleType
from unittest.mock import patch

from benchmarks.policies.hcache import HCachePlanner, LayerSplitCache, LayerSplitForward
from benchmarks.policies.kvpr import KvprPlanner, PositionBlocks
from hsrpc.config import CachePolicy
from hsrpc.engine import engine, startup
from hsrpc.engine.tasks import executor


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
        """For people: an emulation is named as one."""
        return f"{self} (emulated)" if self.paper else str(self)

    @property
    def cache_policy(self) -> CachePolicy:
        """The engine's; an emulation's planner sets its own."""
        return CachePolicy.AUTO if self.paper else CachePolicy(self)


@contextmanager
def emulated(policy: Policy, hidden_layers: int | None = None) -> Iterator[None]:
    """Engines that are entered inside follow `policy`; one of hsrpc's own changes nothing.

    `hidden_layers` overrides HCache's rule.
    """
    with ExitStack() as stack:
        for module, name, value in _replacements(policy, hidden_layers):
            stack.enter_context(patch.object(module, name, value))
        yield


def _replacements(policy: Policy, hidden_layers: int | None) -> list[tuple[ModuleType, str, object]]:
    match policy:
        case Policy.KVPR:
            return [(startup, "Planner", KvprPlanner), (engine, "BlockManager", PositionBlocks)]
        case Policy.HCACHE:
            return [
                (startup, "Planner", partial(HCachePlanner, hidden_layers=hidden_layers)),
                (startup, "CacheManager", LayerSplitCache),
                (executor, "Forward", LayerSplitForward),
            ]
        case _:
            return []
