"""What the tests of several GPUs share: configurations that stream, a plan that no machine decides, processes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.constraint import Regex
from hsrpc.engine.gpus.ranks import Ranks
from hsrpc.plan.placement import ResidentChoices, WeightChoice
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import LayerSizes, Stays
from hsrpc.request import Delta
from hsrpc.testing.processes import is_there
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import collect, ids, text

PATIENCE = 30.0
"""Seconds that a test waits at most for something that takes milliseconds."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=2, prompt_logprobs=0, ignore_eos=True)
REPEATING_LESS = SamplingParams(temperature=0.9, seed=5, max_tokens=12, repetition_penalty=1.3, ignore_eos=True)
MATCHING = SamplingParams(temperature=1.0, seed=5, max_tokens=12, constraint=Regex("[ab]{3}(c|d)+"))


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


async def ask_with_settings(engine: Engine, made: Reference) -> list[list[Delta]]:
    """What requests get whose settings depend on all tokens before: one each of every kind, of several prompts."""
    asked = [(prompt, params) for prompt in made.prompts[:3] for params in (DRAWN, REPEATING_LESS, MATCHING)]
    return await asyncio.gather(*(collect(engine.generate(*each)) for each in asked))


def assert_same(found: list[list[Delta]], wanted: list[list[Delta]]) -> None:
    """The same tokens, and log-probabilities but for rounding; constrained outputs match."""
    assert all(re.fullmatch("[ab]{3}[cd]+", text(each)) for each in found[2::3])
    for one, other in zip(found, wanted, strict=True):
        assert ids(one) == ids(other)
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)
    assert all(logprobs(each) for each in found[::3])


def logprobs(deltas: list[Delta]) -> list[float]:
    return [each.logprob for delta in deltas for each in (*delta.prompt_logprobs, *delta.logprobs)]


def in_all_ways(number: int, layer: LayerSizes) -> Stays:
    """One of four layers streams, one does all that there is, one is spread over the GPUs, one stays on each."""
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
