"""Weights that several GPUs hold together: their bytes, when they are worth it, and what a step then waits for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.config import EngineConfig
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.sizes import ALIGNMENT, Stays
from hsrpc.plan.step_time import beside
from tests.plan.test_plan import GIB, OPT_6_7B, PCIE5_H100

LAYER = OPT_6_7B.layers[0]
BY_NVLINK = replace(PCIE5_H100, gather_bandwidth=190e9)
BY_HOST = replace(PCIE5_H100, gather_bandwidth=PCIE5_H100.load_bandwidth / 2)


def planned(gpus: int, hardware: Hardware, device: int = 6 * GIB, **settings: object) -> Plan:
    """OPT-6.7B, 12.4 GiB of weights; few requests, so that weights count."""
    config = EngineConfig(**({"cache_policy": "kv", "max_batch": 4, "max_model_len": 1024} | settings))
    budgets = Budgets(device=device, host=60 * GIB)
    return Planner(OPT_6_7B.on_gpus(gpus), budgets, hardware, config).plan()


@given(gpus=st.integers(2, 8), share=st.floats(0, 1), keeps=st.integers(0, len(LAYER.tensors)))
def test_pieces_and_parts_make_the_layer(gpus: int, share: float, keeps: int) -> None:
    """What is spread and what is loaded are all that does not stay, in equal parts, with padding of each."""
    ready = frozenset(tensor.name for tensor in LAYER.tensors[:keeps])
    placed = replace(LAYER, num_gpus=gpus).placed(Stays(ready=ready, spread=share))
    rest = sum(tensor.bus_bytes for tensor in LAYER.tensors[keeps:])
    padding = 2 * gpus * ALIGNMENT
    whole = gpus * (placed.spread_bytes + placed.bus_bytes)
    assert rest - 1 <= whole <= rest + padding
    assert rest <= placed.buffer_bytes <= rest + padding
    assert gpus * placed.spread_bytes == pytest.approx(share * rest, abs=padding)
    assert placed.bus_bytes <= placed.host_bytes <= placed.bus_bytes + 2 * ALIGNMENT
    assert share < 1 or placed.bus_bytes == placed.host_bytes == 0


def test_memory_of_several_holds_more_than_that_of_each() -> None:
    """Each has less than half of the weights, and no bus carries any; one GPU alone has nothing to spread."""
    one, two = planned(1, BY_NVLINK), planned(2, BY_NVLINK, device=9 * GIB)
    assert one.spread_share == 0
    assert DeviceUse.SPREAD_WEIGHTS not in one.device_bytes
    assert two.spread_share == pytest.approx(1 - two.resident_share)
    assert not any(layer.bus_bytes for layer in two.placed)
    assert two.device_bytes[DeviceUse.RESIDENT_WEIGHTS] + two.device_bytes[DeviceUse.SPREAD_WEIGHTS] < 9 * GIB
    assert sum(two.device_bytes.values()) <= 9 * GIB
    assert two.prediction.peers == pytest.approx(two.gathered_bytes / BY_NVLINK.gather_bandwidth)
    assert two.prediction.step >= two.prediction.peers


def test_spreading_is_worth_it_where_gathering_is_fast() -> None:
    """Else the same memory holds weights on each GPU, which need not be gathered."""
    by_nvlink, by_host = planned(2, BY_NVLINK), planned(2, BY_HOST)
    assert by_nvlink.spread_share > 0.5
    assert by_host.spread_share == 0
    assert by_host.resident_share > 0.1
    for hardware, plan in ((BY_NVLINK, by_nvlink), (BY_HOST, by_host)):
        same = planned(2, hardware, resident_share=plan.resident_share)
        assert same.spread_share == 0
        assert plan.prediction.mean_tokens_per_second >= same.prediction.mean_tokens_per_second


@pytest.mark.parametrize("gpus", [2, 4])
def test_a_step_takes_no_less_than_its_gathers(gpus: int) -> None:
    """By the closed form and by the list, whatever is slowest; a layer's buffer is one after the other's for all."""
    plan = planned(gpus, BY_NVLINK)
    slow = replace(plan, hardware=replace(BY_NVLINK, gather_bandwidth=2e9))
    for each in (plan, slow):
        found = predict_at(each, OPT_6_7B, 512)
        assert found.peers == pytest.approx(plan.gathered_bytes / each.hardware.gather_bandwidth)
        assert found.step >= max(found.peers, beside(found.bus, found.gpu, math.inf), (found.bus + found.gpu) / 2)
    assert predict_at(slow, OPT_6_7B, 512).step == pytest.approx(predict_at(slow, OPT_6_7B, 512).peers, rel=0.1)


def test_the_limit_of_several_is_that_of_an_equal_part() -> None:
    """What crosses buses and is computed is divided; what comes from the others comes to each."""
    record = StepRecord(
        seconds=1.0,
        num_requests=8,
        decode_tokens=8,
        prefill_tokens=0,
        context_tokens=8000,
        weight_bytes=10**10,
        cache_bytes=10**9,
        regenerated_tokens=0,
    )
    alone = roofline(record, OPT_6_7B, BY_NVLINK)
    both = roofline(replace(record, num_gpus=2), OPT_6_7B, BY_NVLINK, gathered_bytes=4e10)
    assert both.bus == pytest.approx(alone.bus / 2)
    assert both.peers == both.seconds == pytest.approx(4e10 / 190e9)
