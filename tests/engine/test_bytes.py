"""Memory: what a device hands out is what the plan says, line by line, and steps stay within the lines for the rest."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from hsrpc import Engine
from hsrpc.core.memory_use import DeviceUse, HostUse
from hsrpc.core.plan import Plan
from hsrpc.device.device import CpuDevice
from hsrpc.engine import startup
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import collect, config_for, greedy, ids, tight
from tests.engine.test_coded_weights import config_for as config_of_shape

BOUNDS = {DeviceUse.HIDDEN_STATES, DeviceUse.WORKSPACE, DeviceUse.GRAPHS, DeviceUse.RUNTIME}
"""Lines for what torch's own operations and libraries allocate."""
EXACT = (set(DeviceUse) | set(HostUse)) - BOUNDS - {DeviceUse.MEASUREMENT, HostUse.MEASUREMENT}
RESIDENT = {"gpu_memory": "1GiB", "host_memory": "64MiB", "resident_share": 1.0}
STREAMED = {"gpu_memory": "1GiB", "host_memory": "64MiB", "placement": "host"}
POLICIES = [
    {"cache_policy": "kv", "activation_share": None},
    {"cache_policy": "activation", "activation_share": None},
    {"cache_policy": "hybrid", "activation_share": 0.5},
    {"cache_policy": "auto", "activation_share": None},
    {"cache_policy": "recompute", "activation_share": None},
]
PLACEMENTS = [
    STREAMED,
    RESIDENT,
    {"gpu_memory": "1GiB", "host_memory": "64MiB", "resident_share": 0.45},
]


class PeakDevice(CpuDevice):
    """Remembers the most that was held for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[DeviceUse | HostUse, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, use: DeviceUse) -> torch.Tensor:
        found = super().empty(shape, dtype, use)
        self.most[use] = max(self.most.get(use, 0), self.allocated[use])
        return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PeakDevice:
    """The engine's; the machine that the tests run on decides nothing."""
    device = PeakDevice()
    monkeypatch.setattr(startup, "open_device", lambda _: device)
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    return device


def lines(plan: Plan) -> dict[DeviceUse | HostUse, int]:
    """Both budgets' exact lines."""
    return {use: size for use, size in {**plan.device_bytes, **plan.host_bytes}.items() if use in EXACT}


def taken(device: CpuDevice) -> dict[DeviceUse | HostUse, int]:
    """What is held now on those lines."""
    gc.collect()
    return {use: size for use, size in device.allocated.items() if use in EXACT and size}


def without(plan: Mapping[DeviceUse | HostUse, int]) -> dict[DeviceUse | HostUse, int]:
    """Lines that are not 0."""
    return {use: size for use, size in plan.items() if size}


async def run(engine: Engine, prompts: Sequence[list[int]], num_tokens: int = 12) -> list[list[int]]:
    found = await asyncio.gather(*(collect(engine.generate(prompt, greedy(num_tokens))) for prompt in prompts))
    return [ids(deltas) for deltas in found]


@pytest.mark.parametrize("placement", [*PLACEMENTS, None], ids=["host", "resident", "a part", "small"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["cache_policy"])
@pytest.mark.parametrize("model", ["opt-odd-heads", "llama-gqa-tied", "mistral-window"])
async def test_what_is_allocated_is_what_was_planned(
    model: str,
    policy: dict[str, object],
    placement: dict[str, object] | None,
    device: PeakDevice,
    reference: Callable[[str], Reference],
) -> None:
    """Every line, to the byte, before and after requests; also where the budgets are as small as can be."""
    made = reference(model)
    config = config_for(made, **policy, **placement) if placement else tight(made, **policy)
    async with Engine(config) as engine:
        assert taken(device) == without(lines(engine.plan))
        await run(engine, made.prompts[:4])
        assert taken(device) == without(lines(engine.plan))
        assert (DeviceUse.WEIGHT_BUFFERS in taken(device)) == (placement is not RESIDENT)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["host", "resident", "a part"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["cache_policy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_coded_weights_take_no_more_than_was_planned(
    dtype: str, policy: dict[str, object], placement: dict[str, object], device: PeakDevice, tmp_path: Path
) -> None:
    """All lines but that of the coded weights to the byte, and while they are coded the room of their buffers does."""
    placement = {"placement": "auto"} | placement
    config = config_of_shape(tmp_path, "opt", dtype=dtype, weight_coding="lossless", **policy, **placement)
    async with Engine(config) as engine:
        planned, found = lines(engine.plan), taken(device)
        most, coded = planned.pop(HostUse.STREAMED_WEIGHTS), found.pop(HostUse.STREAMED_WEIGHTS, 0)
        assert found == without(planned)
        packed = [layer.packed for layer in engine._opened.prefetcher._weights.layers if layer.packed is not None]
        assert coded == sum(map(len, packed))
        assert 0.8 * most <= coded <= most
        assert device.most.get(DeviceUse.WEIGHT_BUFFERS, 0) == planned[DeviceUse.WEIGHT_BUFFERS]


def test_what_is_gone_is_not_counted() -> None:
    """Views keep memory; each use has its own bytes, those of other threads too."""
    device = CpuDevice()
    kept = device.empty((3, 5), torch.float16, DeviceUse.WORKSPACE)
    view = device.empty((8,), torch.uint8, DeviceUse.WORKSPACE)[2:4]
    pinned = device.pinned(7, HostUse.CACHE_BLOCKS).view(7, 1)
    assert device.allocated == {DeviceUse.WORKSPACE: 38, HostUse.CACHE_BLOCKS: 7}
    del view
    assert device.allocated == {DeviceUse.WORKSPACE: kept.nbytes, HostUse.CACHE_BLOCKS: pinned.nbytes}
    del kept, pinned
    assert not device.allocated
