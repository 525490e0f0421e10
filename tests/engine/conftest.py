"""Reference models, made once a run, and configurations as tight as the planner allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from hsrpc.config import EngineConfig
from hsrpc.engine import startup
from hsrpc.model.spec import load_spec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ModelSizes
from hsrpc.testing.ordered_device import OrderedDevice, ordered_devices
from tests.engine.reference import Reference, make_reference

torch.set_num_threads(1)

HARDWARE = Hardware(load_bandwidth=1e10, store_bandwidth=1e10, gemm_rate=1e11, memory_bandwidth=1e11)


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that the tests run on decides nothing."""
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)


@pytest.fixture
def ordered() -> Iterator[list[OrderedDevice]]:
    """Engines compute on a device that fails the test if two accesses to memory are in no order.

    A step takes about four times as long on it. So it is for one test of each kind of step, and for all that end steps
    early; the many combinations of families, policies and budgets, which launch no other operations, do without.
    """
    with ordered_devices() as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """References by model name."""
    return cache(lambda name: make_reference(name, tmp_path_factory.mktemp(name)))


def tightest(config: EngineConfig) -> EngineConfig:
    """`config` with the smallest device budget, then the smallest host budget, with which `max_batch` requests run."""
    config = replace(config, min_batch=config.max_batch)
    sizes = load_spec(Path(config.model), torch.float32).sizes
    budgets = _tightest(sizes, replace(config, model=""))
    return replace(config, gpu_memory=budgets.device, host_memory=budgets.host)


@cache
def _tightest(sizes: ModelSizes, config: EngineConfig) -> Budgets:
    planner, batch = Planner(sizes, Budgets(device=0, host=2**34), HARDWARE, config), config.max_batch
    device = smallest(lambda size: planner.fits(Budgets(device=size, host=2**34), batch))
    return Budgets(device=device, host=smallest(lambda size: planner.fits(Budgets(device=device, host=size), batch)))


def smallest(is_enough: Callable[[int], bool]) -> int:
    """Bytes that are enough, where 1 KiB less is not."""
    low, high = 0, 2**18
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
