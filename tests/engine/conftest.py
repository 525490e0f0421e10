"""Reference models, made once a run, and configurations as tight as the planner allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.model.spec import load_spec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from tests.engine.reference import Reference, make_reference

torch.set_num_threads(1)

HARDWARE = Hardware(load_bandwidth=1e10, store_bandwidth=1e10, gemm_rate=1e11, memory_bandwidth=1e11)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """References by model name."""
    return cache(lambda name: make_reference(name, tmp_path_factory.mktemp(name)))


def tightest(config: EngineConfig) -> EngineConfig:
    """`config` with the smallest device budget, then the smallest host budget, with which `max_batch` requests run."""
    sizes = load_spec(Path(config.model), torch.float32).sizes
    device = _smallest(lambda size: _plans(sizes, Budgets(device=size, host=2**34), config))
    host = _smallest(lambda size: _plans(sizes, Budgets(device=device, host=size), config))
    return replace(config, gpu_memory=device, host_memory=host)


def _plans(sizes: object, budgets: Budgets, config: EngineConfig) -> bool:
    try:
        return Planner(sizes, budgets, HARDWARE, config).plan().max_batch == config.max_batch
    except ConfigError:
        return False


def _smallest(fits: Callable[[int], bool]) -> int:
    low, high = 0, 2**34
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
