"""What several GPUs load of a layer, put together, is the layer; and each takes of host memory what was planned."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.device.device import CpuDevice
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.engine.loading import load_weights
from hsrpc.engine.startup import make_plan
from hsrpc.engine.weights import ModelWeights
from hsrpc.model.families.registry import create_family
from hsrpc.plan.memory_use import HostUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ALIGNMENT
from tests.engine.gpus.support import config_for
from tests.engine.reference import Reference


class Part(DeviceGroup):
    """One of several GPUs, which only loads."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        raise AssertionError("nothing is computed")

    def meet(self) -> None:
        pass

    def leave(self) -> None:
        pass


@given(num_bytes=st.integers(1, 10**6), size=st.integers(1, 16))
def test_parts_cover_a_layer(num_bytes: int, size: int) -> None:
    """One behind the other, all of one size; what pads the last is less than a line of each."""
    parts = [Part(rank, size).part(num_bytes) for rank in range(size)]
    assert parts[0][0] == 0
    assert all(first[1] == second[0] for first, second in itertools.pairwise(parts))
    assert len({end - start for start, end in parts}) == 1
    assert num_bytes <= parts[-1][1] <= num_bytes + size * ALIGNMENT
    assert size > 1 or parts == [(0, num_bytes)]


@pytest.mark.parametrize(
    ("settings", "is_exact"),
    [({}, True), ({"placement": "auto", "resident_share": 0.5}, True), ({"dtype": "bfloat16"}, False)],
    ids=["plain", "partly resident", "coded"],
)
@pytest.mark.parametrize("size", [2, 3])
def test_parts_put_together_are_the_layers(
    size: int, settings: dict[str, object], is_exact: bool, reference: Callable[[str], Reference]
) -> None:
    """Byte by byte, whatever their format, as one GPU loads them."""
    coding = "none" if is_exact else "lossless"
    config = config_for(reference("llama-gqa-tied"), 1, weight_coding=coding, gpu_memory="1GiB", **settings)

    def load(group: DeviceGroup) -> ModelWeights:
        planned = make_plan(config, partial(plan_for, size=group.size))
        family, device = create_family(planned.spec, planned.plan.max_model_len), CpuDevice()
        source = planned.files.source
        found = load_weights(family, source, planned.plan, device, threading.Event(), group=group)
        taken, bound = device.allocated[HostUse.STREAMED_WEIGHTS], planned.plan.host_bytes[HostUse.STREAMED_WEIGHTS]
        assert taken == bound if is_exact else taken <= bound
        return found

    whole, parts = load(ALONE), [load(Part(rank, size)) for rank in range(size)]
    for number, layer in enumerate(whole.layers):
        assert layer.packed is not None
        assert all(part.layers[number].parts == layer.parts for part in parts)
        joined = torch.cat([part.layers[number].packed for part in parts])
        for part in layer.parts:
            assert torch.equal(part.data(joined), part.data(layer.packed))
        assert len(joined) <= len(layer.packed) + size * ALIGNMENT


def plan_for(planner: Planner, size: int) -> Plan:
    """The plan of each of so many GPUs, with the budgets of one."""
    return Planner(planner.sizes.on_gpus(size), planner.budgets, planner.hardware, planner.config).plan()
