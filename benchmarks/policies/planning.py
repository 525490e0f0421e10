"""What the plans of emulated policies begin with."""

from __future__ import annotations

from dataclasses import replace

from hsrpc.config import CachePolicy, Placement
from hsrpc.errors import ConfigError
from hsrpc.plan.planner import Planner


def with_share(planner: Planner, share: float) -> Planner:
    """The same planner for blocks of which so large a part are activations, all of them on the host.

    Raises:
        ConfigError: the cache may lie on the device, where no policy is emulated.
    """
    config = planner.config
    if config.placement is not Placement.HOST:
        raise ConfigError("placement", config.placement, "not emulated", "use placement=host")
    config = replace(config, cache_policy=CachePolicy.HYBRID, activation_share=share)
    return Planner(planner.sizes, planner.budgets, planner.hardware, config)
