"""Layer weights: the same numbers wherever they lie, and a prefetcher that is never further ahead than its buffers."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hsrpc.engine.bus import BusOrder
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine.loading import load_weights
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.engine.weights import ModelWeights
from hsrpc.errors import CheckpointError, EngineUnavailableError
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family
from hsrpc.model.spec import load_spec
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ALIGNMENT
from hsrpc.schedule.sweep import BUFFERS
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import until

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def family(reference: Callable[[str], Reference]) -> Family:
    return create_family(load_spec(reference("opt").directory, torch.float32))


def plan_for(family: Family, resident: tuple[frozenset[str], ...]) -> Plan:
    """A plan in which exactly these tensors stay on the device."""
    config = EngineConfig(device="cpu", max_batch=1, max_model_len=64, expected_context=32, max_prefill_tokens=32)
    plan = Planner(family.sizes, Budgets(device=2**30, host=2**30), HARDWARE, config).plan()
    streamed = tuple(layer.streamed(stays) for layer, stays in zip(family.sizes.layers, resident, strict=True))
    return replace(plan, resident=resident, streamed=streamed)


def load(family: Family, plan: Plan) -> ModelWeights:
    return load_weights(family, RandomWeights(0), plan, CpuDevice(), threading.Event())


def expected(family: Family, layer: int) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in family.layer_tensors(layer):
        found[tensor.name] = torch.empty(tensor.shape)
        RandomWeights(0).read(tensor, found[tensor.name])
    return found


def assert_same(found: object, wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@given(data=st.data())
def test_any_split_gives_the_same_tensors(family: Family, data: st.DataObject) -> None:
    """Resident or streamed, each tensor has its numbers, aligned and apart from the others."""
    names = sorted(family.sizes.layers[0].names)
    resident = tuple(data.draw(st.frozensets(st.sampled_from(names)) | st.just(frozenset(names))) for _ in range(4))
    plan = plan_for(family, resident)
    for index, layer in enumerate(load(family, plan).layers):
        assert set(layer.resident) == resident[index]
        assert (layer.packed is None) == (resident[index] == set(names))
        buffer = torch.full((plan.weight_buffer_bytes,), 255, dtype=torch.uint8)
        if layer.packed is not None:
            assert len(layer.packed) == plan.streamed_bytes[index]
            buffer[: len(layer.packed)] = layer.packed
        assert_same(layer.open(buffer, buffer[:0]).tensors, expected(family, index))
        ends = [0]
        for part in layer.parts:
            assert part.offset % ALIGNMENT == 0
            assert part.offset >= ends[-1]
            ends.append(part.offset + part.packing.num_bytes)


def test_fixed_tensors_are_read(family: Family) -> None:
    """Embeddings and head, each as its source has them."""
    fixed = load(family, plan_for(family, (frozenset(),) * NUM_LAYERS)).fixed
    for tensor in family.fixed_tensors():
        wanted = torch.empty(tensor.shape)
        RandomWeights(0).read(tensor, wanted)
        assert torch.equal(fixed[tensor.name], wanted)


class FailingSource(RandomWeights):
    """A disk that fails in layer 2, and counts what is read."""

    def __init__(self) -> None:
        super().__init__(0)
        self.reads = 0

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        self.reads += 1
        if any(".2." in source for source in tensor.sources):
            raise CheckpointError("model.safetensors: expected 8 bytes, found 4; fetch it again")
        super().read(tensor, out)


def test_an_error_of_one_layer_ends_loading(family: Family) -> None:
    """It comes through as it is, and no thread is left."""
    plan = plan_for(family, (frozenset(),) * NUM_LAYERS)
    with pytest.raises(CheckpointError, match="fetch it again"):
        load_weights(family, FailingSource(), plan, CpuDevice(), threading.Event())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


class SlowSource(RandomWeights):
    """Fails at once, in the fixed part; every other tensor takes its time."""

    def __init__(self) -> None:
        super().__init__(0)
        self.reads = 0

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        self.reads += 1
        if self.reads == 1:
            raise CheckpointError("model.safetensors: expected 8 bytes, found 4; fetch it again")
        time.sleep(0.02)


def test_an_error_of_the_fixed_part_ends_loading(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are not all read before it is told."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    plan, source = plan_for(family, (frozenset(),) * NUM_LAYERS), SlowSource()
    with pytest.raises(CheckpointError, match="fetch it again"):
        load_weights(family, source, plan, CpuDevice(), threading.Event())
    assert source.reads < len(list(family.all_tensors())) / 2


def test_once_stopped_no_layer_is_read(family: Family) -> None:
    """Only the fixed part, which is read first."""
    stop, source = threading.Event(), FailingSource()
    stop.set()
    with pytest.raises(EngineUnavailableError, match="stopped"):
        load_weights(family, source, plan_for(family, (frozenset(),) * NUM_LAYERS), CpuDevice(), stop)
    assert source.reads == len(family.fixed_tensors())


RESIDENT_LAYERS = [(), (0,), (1, 2), (3,), (0, 1, 3)]


@asynccontextmanager
async def prefetching(
    family: Family, resident: tuple[int, ...] = (), bus: BusOrder | None = None
) -> AsyncIterator[WeightPrefetcher]:
    """A running prefetcher; these layers are resident as a whole."""
    names = family.sizes.layers[0].names
    plan = plan_for(family, tuple(names if i in resident else frozenset() for i in range(NUM_LAYERS)))
    prefetcher = WeightPrefetcher(load(family, plan), plan, CpuDevice(), bus or BusOrder())
    task = asyncio.create_task(prefetcher.run())
    try:
        yield prefetcher
    finally:
        task.cancel()
        await asyncio.wait([task])


def is_settled(prefetcher: WeightPrefetcher, held: int = 0) -> bool:
    """Every buffer that nobody holds is loaded."""
    return prefetcher._ready.qsize() == BUFFERS - held


@pytest.mark.parametrize("resident", RESIDENT_LAYERS)
async def test_sweeps_give_the_layers_in_order(family: Family, resident: tuple[int, ...]) -> None:
    """Sweep after sweep, each layer's own numbers; those of resident layers without a buffer."""
    async with prefetching(family, resident) as prefetcher, asyncio.timeout(20):
        for _ in range(3):
            for layer in range(NUM_LAYERS):
                taken = await prefetcher.take(layer)
                assert taken.layer == layer
                assert (taken.buffer is None) == (layer in resident)
                assert_same(taken.tensors, expected(family, layer))
                prefetcher.give_back(taken, None)
        await until(lambda: is_settled(prefetcher))
        layer_bytes = family.sizes.layers[0].weight_bytes
        assert prefetcher.streamed_bytes == (3 * (NUM_LAYERS - len(resident)) + BUFFERS) * layer_bytes


async def test_a_resident_model_streams_nothing(family: Family) -> None:
    """All layers come at once, and there is no buffer."""
    async with prefetching(family, (0, 1, 2, 3)) as prefetcher, asyncio.timeout(20):
        for layer in range(NUM_LAYERS):
            prefetcher.give_back(await prefetcher.take(layer), None)
        prefetcher.restart(1)
        assert_same((await prefetcher.take(0)).tensors, expected(family, 0))
        assert prefetcher.streamed_bytes == 0
        assert prefetcher._free.empty()


async def test_it_is_ahead_by_its_buffers_and_no_further(family: Family) -> None:
    """Loading goes on only when a buffer comes back; a buffer in use is not written to."""
    async with prefetching(family) as prefetcher, asyncio.timeout(20):
        taken = await prefetcher.take(0)
        await until(lambda: is_settled(prefetcher, held=1))
        await asyncio.sleep(0.01)
        assert prefetcher.streamed_bytes == BUFFERS * family.sizes.layers[0].weight_bytes
        assert_same(taken.tensors, expected(family, 0))
        prefetcher.give_back(taken, None)
        await until(lambda: is_settled(prefetcher))
        assert prefetcher.streamed_bytes == (BUFFERS + 1) * family.sizes.layers[0].weight_bytes


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("taken", range(NUM_LAYERS + 1))
async def test_restarting_in_any_phase(family: Family, taken: int, settle: bool) -> None:
    """Before the first layer, in the middle, at the end; with all buffers loaded or one being loaded."""
    async with prefetching(family, (1,)) as prefetcher, asyncio.timeout(20):
        for _ in range(2):
            for layer in range(taken):
                prefetcher.give_back(await prefetcher.take(layer), None)
            if settle:
                await until(lambda: is_settled(prefetcher))
            prefetcher.restart(1)
            for layer in range(NUM_LAYERS):
                again = await prefetcher.take(layer)
                assert_same(again.tensors, expected(family, layer))
                prefetcher.give_back(again, None)
        await until(lambda: is_settled(prefetcher))
        assert prefetcher._free.empty()


@pytest.mark.parametrize("resident", [(), (0, 2)])
async def test_weights_go_between_the_blocks(
    family: Family, resident: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While blocks are sent, no part of a layer's weights is ahead of the blocks of the layers before it."""
    monkeypatch.setattr("hsrpc.engine.tasks.weights._MIN_PART_BYTES", 1)
    bus = BusOrder()
    async with prefetching(family, resident, bus) as prefetcher, asyncio.timeout(20):
        streamed = [layer for layer in range(NUM_LAYERS) if layer not in resident]
        await until(lambda: is_settled(prefetcher))
        sent = prefetcher.streamed_bytes
        bus.move(0.0)
        for layer in streamed[:2]:
            prefetcher.give_back(await prefetcher.take(layer), None)
        for position in (0.5, 1.0, 1.5, 2.0, 2.25, 2.75):
            bus.move(position)
            await until(lambda wanted=position: prefetcher.streamed_bytes == sent + _due(family, streamed, wanted))
            await asyncio.sleep(0.005)
            assert prefetcher.streamed_bytes == sent + _due(family, streamed, position)


def _due(family: Family, streamed: list[int], position: float) -> int:
    """Bytes that may be sent beside blocks up to `position`, of the third and fourth streamed layers."""
    starts = [*streamed, *(layer + NUM_LAYERS for layer in streamed)]
    shares = [(position - begin) / (end - begin) for begin, end in pairwise(starts[1:4])]
    return sum(math.ceil(family.sizes.layers[0].weight_bytes * min(1.0, max(0.0, share))) for share in shares)
