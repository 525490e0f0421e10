"""Layer weights: the same numbers wherever they lie, and loaded to the buffers that the step's list says."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.loading import load_weights
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.engine.weights import ModelWeights
from hsrpc.engine.worker import Worker
from hsrpc.errors import CheckpointError, EngineUnavailableError
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family, Weights
from hsrpc.model.spec import load_spec
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import ALIGNMENT, Stays
from hsrpc.schedule import sweep as sweeps
from hsrpc.schedule.sweep import BUFFERS, NOTHING_CARRIED, BatchShape, Lane, Op, OpKind, OpList, sweep
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import PATIENCE, bare_step

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def family(reference: Callable[[str], Reference]) -> Family:
    return create_family(load_spec(reference("opt").directory, torch.float32))


def plan_for(family: Family, names: tuple[frozenset[str], ...]) -> Plan:
    """A plan in which exactly these tensors stay on the device."""
    config = EngineConfig(device="cpu", max_batch=1, max_model_len=64, expected_context=32, max_prefill_tokens=32)
    plan = Planner(family.sizes, Budgets(device=2**30, host=2**30), HARDWARE, config).plan()
    resident = tuple(map(Stays, names))
    placed = tuple(layer.placed(stays) for layer, stays in zip(family.sizes.layers, resident, strict=True))
    return replace(plan, resident=resident, placed=placed)


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
    names = [tensor.name for tensor in family.sizes.layers[0].tensors]
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
PLAIN = (BatchShape(),)
LOADING = (BatchShape(loads=True),) * 3


def make_prefetcher(family: Family, resident: tuple[int, ...] = (), share: int = 0) -> WeightPrefetcher:
    """These layers are resident as a whole; of the others the first `share` tensors are."""
    names = [tensor.name for tensor in family.sizes.layers[0].tensors]
    stays = tuple(frozenset(names if i in resident else names[:share]) for i in range(NUM_LAYERS))
    plan = plan_for(family, stays)
    return WeightPrefetcher(load(family, plan), plan, CpuDevice(), family)


def lists(prefetcher: WeightPrefetcher, count: int, batches: tuple[BatchShape, ...] = PLAIN) -> list[OpList]:
    """One after the other, each run to its end."""
    found, carried = [], NOTHING_CARRIED
    for _ in range(count):
        found.append(sweep(prefetcher.places, batches, carried))
        carried = found[-1].carries
    return found


class Layers:
    """The compute lane of a list: at a layer's first and last use its weights must be its own."""

    def __init__(self, family: Family, prefetcher: WeightPrefetcher) -> None:
        self.seen: list[tuple[int, bool]] = []
        """Layers, and whether their weights were in a buffer."""
        self._family = family
        self._prefetcher = prefetcher
        self._slot = -1

    def launch(self, op: Op) -> None:
        if op.kind is OpKind.PROJECT:
            self._slot = op.slot
            self.seen.append((op.layer, op.slot >= 0))
        if op.kind in (OpKind.PROJECT, OpKind.FINISH):
            found = self._prefetcher.open(op.layer, self._slot)
            assert_same(found.tensors, expected(self._family, op.layer))


@pytest.mark.parametrize("share", [0, 5])
@pytest.mark.parametrize("resident", RESIDENT_LAYERS)
def test_sweeps_give_the_layers_in_order(family: Family, resident: tuple[int, ...], share: int) -> None:
    """Sweep after sweep, each layer's own numbers in the buffer that the list says; resident layers without one."""
    prefetcher = make_prefetcher(family, resident, share)
    layers = Layers(family, prefetcher)
    for ops in lists(prefetcher, 3):
        for op in ops.ops:
            (prefetcher.launch if op.kind is OpKind.LOAD_WEIGHTS else layers.launch)(op)
    assert layers.seen == [(layer, layer not in resident) for layer in range(NUM_LAYERS)] * 3
    streamed = [layer.bus_bytes for layer in prefetcher.places if layer.bus_bytes]
    assert len(streamed) == NUM_LAYERS - len(resident)
    assert (set(streamed) == {family.sizes.layers[0].weight_bytes}) == (share == 0)
    assert prefetcher.streamed_bytes == 3 * sum(streamed) + sum(streamed[:BUFFERS])


def test_a_family_adds_to_what_is_opened(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each place where a layer's weights lie: where it stays, or a buffer that it streams through."""
    asked: list[int] = []

    def opened(layer: int, w: Weights) -> Weights:
        asked.append(layer)
        return {**w, "addresses": torch.tensor([tensor.data_ptr() for tensor in w.values()])}

    monkeypatch.setattr(family, "opened", opened)
    prefetcher = make_prefetcher(family, (1,), 2)
    for layer, slot in [(0, 0), (0, 1), (0, 0), (1, -1), (1, -1)]:
        *tensors, addresses = prefetcher.open(layer, slot).tensors.values()
        assert addresses.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert asked == [0, 0, 1]


def test_a_resident_model_streams_nothing(family: Family) -> None:
    """Its list loads no weights, and there is no buffer for them."""
    names, device = family.sizes.layers[0].names, CpuDevice()
    plan = plan_for(family, (names,) * NUM_LAYERS)
    weights = load_weights(family, RandomWeights(0), plan, device, threading.Event())
    prefetcher = WeightPrefetcher(weights, plan, device, family)
    layers = Layers(family, prefetcher)
    for ops in lists(prefetcher, 2):
        assert not ops.lanes[Lane.WEIGHTS]
        for op in ops.ops:
            layers.launch(op)
    assert layers.seen == [(layer, False) for layer in range(NUM_LAYERS)] * 2
    assert prefetcher.streamed_bytes == 0
    assert not device.allocated.get(DeviceUse.WEIGHT_BUFFERS)


def test_a_layer_is_opened_once(family: Family) -> None:
    """In each buffer: making views of all tensors takes long."""
    prefetcher = make_prefetcher(family, (1,))
    for layer, slots in ((0, (0, 1)), (1, (-1,)), (2, (0, 1))):
        opened = [prefetcher.open(layer, slot) for slot in slots]
        assert all(a is b for a, b in zip(opened, (prefetcher.open(layer, slot) for slot in slots), strict=True))
        starts = {tuple(t.data_ptr() for t in each.tensors.values()) for each in opened}
        assert len(starts) == len(slots)


@pytest.mark.parametrize("resident", [(), (0, 2)])
def test_the_parts_of_a_layer_are_all_of_it(
    family: Family, resident: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent between the blocks of mini-batches, they are one layer's weights together when it is computed."""
    monkeypatch.setattr(sweeps, "MIN_PART_BYTES", 1000)
    sweep.cache_clear()
    prefetcher = make_prefetcher(family, resident)
    layers, num_parts = Layers(family, prefetcher), 0
    for ops in lists(prefetcher, 3, LOADING):
        for op in ops.ops:
            (prefetcher.launch if op.kind is OpKind.LOAD_WEIGHTS else layers.launch)(op)
        num_parts += len(ops.lanes[Lane.WEIGHTS])
    sweep.cache_clear()
    num_streamed = NUM_LAYERS - len(resident)
    assert num_parts > 2 * 3 * num_streamed
    assert prefetcher.streamed_bytes == (3 * num_streamed + BUFFERS) * family.sizes.layers[0].weight_bytes


async def run_list(
    prefetcher: WeightPrefetcher, run: StepRun, launch: Callable[[Op], None], workers: dict[Lane, Worker]
) -> bool:
    """The prefetcher's task runs its lane, this the others; whether all of it was launched."""
    await prefetcher.steps.put(run)
    await asyncio.gather(*(run.run(lane, workers[lane], launch) for lane in (Lane.CACHE, Lane.COMPUTE)))
    return all([await run.ended.get() for _ in Lane])


@pytest.mark.parametrize("batches", [PLAIN, LOADING], ids=["plain", "loading"])
@pytest.mark.parametrize("resident", [(), (1,)])
async def test_its_task_goes_on_behind_a_step_given_up_anywhere(
    family: Family, resident: tuple[int, ...], batches: tuple[BatchShape, ...]
) -> None:
    """Each list after it begins anew, and gives each layer's numbers; those after whole ones go on."""
    prefetcher = make_prefetcher(family, resident)
    task, num_stops = asyncio.create_task(prefetcher.run()), 0
    async with asyncio.timeout(PATIENCE), Worker("cache") as cache, Worker("compute") as compute:
        workers = {Lane.CACHE: cache, Lane.COMPUTE: compute}
        for stops_at in sweep(prefetcher.places, batches).lanes[Lane.COMPUTE]:
            carried, events = NOTHING_CARRIED, []
            for stops in (False, True, False):
                ops, layers = sweep(prefetcher.places, batches, carried), Layers(family, prefetcher)
                step = bare_step(ops)
                at = ops.ops[min(stops_at, len(ops) - 1)]

                def launch(op: Op, at: Op | None = at if stops else None, layers=layers, step=step) -> None:
                    layers.launch(op)
                    if op is at:
                        step.stop.set()

                run = StepRun(step, CpuDevice(), events)
                is_whole = await run_list(prefetcher, run, launch, workers)
                num_stops += not is_whole
                assert is_whole or stops
                assert not is_whole or [layer for layer, _ in layers.seen] == list(range(NUM_LAYERS))
                carried, events = (ops.carries, run.events) if is_whole else (NOTHING_CARRIED, [])
    task.cancel()
    await asyncio.wait([task])
    assert num_stops > NUM_LAYERS
