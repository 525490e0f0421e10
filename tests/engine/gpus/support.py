"""What the tests of several GPUs share: configurations that stream, a plan that no machine decides, processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.engine.gpus.ranks import Ranks
from hsrpc.plan.placement import ResidentChoices, WeightChoice
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import LayerSizes, Stays
from hsrpc.testing.processes import is_there
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference

PATIENCE = 30.0
"""Seconds that a test waits at most for something that takes milliseconds."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def config_for(made: Reference, gpus: int, **settings: object) -> EngineConfig:
    """Weights and caches on the host; few blocks, and chunks of prompts."""
    base = {
        "max_batch": 3 * gpus,
        "max_model_len": 128,
        "max_prefill_tokens": 24,
        "expected_context": 24,
        "device": "cpu",
        "placement": "host",
        "gpu_memory": "4MiB",
        "host_memory": "16MiB",
        "experts": "stream",
    }
    return EngineConfig(model=str(made.directory), gpus=gpus, **(base | settings))


def planned(planner: Planner) -> Plan:
    """The plan for a machine that is the same everywhere: the ranks' own measurements decide nothing."""
    return Planner(planner.sizes, planner.budgets, HARDWARE, planner.config).plan()


def in_all_ways(number: int, layer: LayerSizes) -> Stays:
    """Of four layers one streams, one does all that there is, one is spread over the GPUs, one stays on each."""
    largest = frozenset({layer.largest_first[0].name})
    return (Stays(), Stays(ready=largest, spread=0.5), Stays(spread=1.0), Stays(ready=layer.names))[number]


def plan_where(planner: Planner, gpus: int, stays: Callable[[int, LayerSizes], Stays] = in_all_ways) -> Plan:
    """The plan of each of so many GPUs, with each layer's weights as `stays` says."""
    found = Planner(planner.sizes.on_gpus(gpus), planner.budgets, HARDWARE, planner.config)
    resident = tuple(stays(*each) for each in enumerate(found.sizes.layers))
    found._choices = ResidentChoices.of(found.sizes, [WeightChoice(resident)])
    return found.plan()


def ranks(engine: Engine) -> Ranks:
    """What a running engine computes with."""
    found = engine._opened.gpus
    assert isinstance(found, Ranks)
    return found


def pids(engine: Engine) -> list[int]:
    return [process.pid for process in ranks(engine).processes]


def until_gone(found: Sequence[int]) -> None:
    """Wait until these processes have ended."""
    end = time.monotonic() + PATIENCE
    while left := [pid for pid in found if is_there(pid)]:
        assert time.monotonic() < end, f"processes {left} are still there"
        time.sleep(0.01)
