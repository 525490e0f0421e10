"""A plan's step by its list: what the closed form says in the extremes, and what was measured in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.guard.cases import CASES, Case, Kind
from hsrpc.config import CachePolicy, Placement
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import DTYPES, in_formats, named_spec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets, Plan, StepPrediction
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at, simulated
from hsrpc.plan.simulated_step import placements, simulated_step
from hsrpc.plan.sizes import ModelSizes
from tests.plan.test_plan import GIB, OPT_6_7B, PCIE5_H100, make_plan

GUARD = Path(__file__).parents[2] / "benchmarks" / "results" / "guard" / "nvidia-h200.json"
MEASURED = {cell["name"]: cell for cell in json.loads(GUARD.read_text())["cases"]}


def on_host(policy: CachePolicy = CachePolicy.HYBRID, share: float | None = 0.5) -> Plan:
    given = {"cache_policy": policy, "activation_share": share, "placement": Placement.HOST, "max_batch": 64}
    return make_plan(OPT_6_7B, device=24 * GIB, hardware=PCIE5_H100, expected_context=512, **given)


def step(plan: Plan, **parts: float) -> float:
    return simulated_step(plan, OPT_6_7B, replace(plan.prediction, **parts), recomputes=False)


def test_a_bus_that_takes_far_longer_is_all_that_counts() -> None:
    """The GPU's part is hidden, but for that of a mini-batch at the end."""
    plan = on_host()
    idle = dict.fromkeys(("forward", "regenerate", "gather", "attention", "head"), 0.0)
    assert step(plan, **idle) == pytest.approx(plan.prediction.bus, rel=1e-3)


def test_a_gpu_that_takes_far_longer_is_all_that_counts() -> None:
    """The bus is hidden, but for a mini-batch's blocks at the beginning."""
    plan = on_host()
    slow = step(plan, attention=20 * plan.prediction.bus)
    assert slow == pytest.approx(plan.prediction.gpu - plan.prediction.attention + 20 * plan.prediction.bus, rel=5e-3)


def test_near_the_balance_they_wait_for_each_other() -> None:
    """Never less than the longer one, and less than both in turn."""
    plan = on_host()
    rest = plan.prediction.gpu - plan.prediction.regenerate
    balanced = step(plan, regenerate=plan.prediction.bus - rest)
    assert plan.prediction.bus < balanced < 1.1 * plan.prediction.bus


def test_layers_with_windows_load_less() -> None:
    """What they do not load, the others do: the bus is as busy, and waits for the GPU where it has little to load."""
    plan = on_host()
    parts = dict.fromkeys(("regenerate", "gather", "attention", "head"), 0.0) | {"forward": plan.prediction.bus}
    prediction = replace(plan.prediction, **parts)
    layers = [replace(layer, sliding_window=64 if i % 2 else None) for i, layer in enumerate(OPT_6_7B.layers)]
    same = [replace(layer, sliding_window=64) for layer in layers]
    mixed, alike = (replace(OPT_6_7B, layers=tuple(each)) for each in (layers, same))
    even, narrow, uneven = (
        simulated_step(plan, sizes, prediction, recomputes=False) for sizes in (OPT_6_7B, alike, mixed)
    )
    assert even == pytest.approx(narrow)
    assert plan.prediction.bus < even < uneven
    only_bus = replace(prediction, forward=0.0)
    assert simulated_step(plan, mixed, only_bus, recomputes=False) == pytest.approx(plan.prediction.bus, rel=1e-3)


def test_what_stays_where_it_is_told_by_its_own_terms() -> None:
    """A step with nothing on the bus is as the closed form has it."""
    plan = make_plan(OPT_6_7B, device=76 * GIB, hardware=PCIE5_H100, max_batch=8)
    assert plan.prediction.bus == 0
    assert simulated(plan, OPT_6_7B, plan.prediction, recomputes=False) == plan.prediction


def test_placements_are_those_of_the_plan() -> None:
    """Bytes on the bus, decoding, and layers in which activation blocks hold K and V."""
    plan = replace(on_host(), kv_layers=frozenset({1}))
    found = placements(plan, OPT_6_7B)
    assert [place.bus_bytes for place in found] == [round(layer.bus_bytes) for layer in plan.placed]
    assert [number for number, place in enumerate(found) if not place.rebuilds] == [1]
    assert not any(place.is_coded for place in found)


def planned(case: Case) -> tuple[ModelSizes, Plan]:
    """The plan that an engine makes for a case on the machine that measured it."""
    config, cell = case.engine_config, MEASURED[case.name]
    spec = named_spec(config.model.removeprefix("random:"), DTYPES[config.dtype])
    device = int(config.gpu_memory)
    budgets = Budgets(device=device, host=int(config.host_memory), runtime=128 * 2**20 + device // 100)
    choices = create_family(spec).format_choices(config.weight_coding, torch.device("cuda"))
    found = []
    for formats in choices:
        sizes = in_formats(spec, formats).sizes
        found.append((sizes, Planner(sizes, budgets, Hardware(**cell["hardware"]), config).plan()))
    return max(found, key=lambda each: each[1].prediction.mean_tokens_per_second)


def measured_and_predicted(case: Case) -> tuple[float, StepPrediction]:
    sizes, plan = planned(case)
    assert plan.max_batch == MEASURED[case.name]["batch"]
    return MEASURED[case.name]["step_seconds"], predict_at(plan, sizes, case.prompt + case.output // 2)


@pytest.mark.parametrize("name", ["host-kv", "host-auto", "planned-24gib", "coded-mixed"])
def test_what_was_measured_is_predicted(name: str) -> None:
    """Steps of the guard's reference, at its own calibration, within 6 %, and never as too short."""
    case = next(case for case in CASES if case.name == name and case.kind is Kind.DECODE)
    measured, prediction = measured_and_predicted(case)
    assert 0.99 < prediction.step / measured < 1.06
