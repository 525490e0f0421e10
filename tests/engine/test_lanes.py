"""A step's list, run by three lanes or on one thread: in order, never too early, and to an end whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import accumulate
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.device.device import CpuDevice, Device, Event, Stream
from hsrpc.engine import lanes
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.worker import Worker
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.schedule.sweep import (
    BUFFERS,
    MIN_PART_BYTES,
    NOTHING_CARRIED,
    BatchShape,
    Carried,
    Lane,
    LayerPlacement,
    Op,
    OpKind,
    OpList,
    Places,
    sweep,
)
from hsrpc.testing.ordered_device import OrderedDevice
from tests.engine.support import PATIENCE, bare_step

T = TypeVar("T")

LAYERS = st.lists(
    st.builds(
        LayerPlacement,
        bus_bytes=st.sampled_from([0, 100, 3 * MIN_PART_BYTES + 7]),
        is_coded=st.booleans(),
        rebuilds=st.booleans(),
        spread_bytes=st.just(0),
    ),
    min_size=1,
    max_size=6,
)
SHAPES = st.lists(st.builds(BatchShape, st.integers(0, 1), *[st.booleans()] * 3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32)


def groups_of(shapes: Sequence[BatchShape]) -> tuple[BatchShape, ...]:
    """Shapes whose group is 0 or 1, which says whether they begin one, with the numbers of groups."""
    numbers = accumulate(shape.group for shape in shapes)
    return tuple(shape._replace(group=number) for shape, number in zip(shapes, numbers, strict=True))


@st.composite
def chains(draw: st.DrawFn) -> tuple[Places, list[tuple[Carried, OpList]]]:
    """Layers, and lists one after the other, some of them behind one that was abandoned."""
    layers, carried, found = tuple(draw(LAYERS)), NOTHING_CARRIED, []
    for shapes in draw(st.lists(SHAPES, min_size=1, max_size=3)):
        found.append((carried, sweep(layers, groups_of(shapes), carried)))
        carried = found[-1][1].carries if draw(st.booleans()) else NOTHING_CARRIED
    return layers, found


STREAMED = LayerPlacement(3 * MIN_PART_BYTES + 7)
EVERYTHING = BatchShape(0, loads=True, rebuilds=True, stores=True)
EXAMPLE = sweep(
    (STREAMED, LayerPlacement(), STREAMED._replace(is_coded=True), STREAMED),
    (EVERYTHING, EVERYTHING._replace(group=1), BatchShape(1), EVERYTHING._replace(group=1)),
)


class Launches:
    """Notes the numbers of a list's operations as they are launched, and does something at some of them."""

    def __init__(self, ops: OpList, then: Callable[[int], object] = lambda _: None) -> None:
        self.order: list[int] = []
        self._ops = ops
        self._numbers = {id(op): number for number, op in enumerate(ops.ops)}
        self._then = then

    def __call__(self, op: Op) -> None:
        number = self._numbers[id(op)]
        self.order.append(number)
        self._then(number)

    def check(self) -> None:
        """Each lane has launched its first ones, in the list's order; none before what it comes after."""
        for lane in Lane:
            assert self.of(lane) == list(self._ops.lanes[lane][: len(self.of(lane))])
        place = {number: index for index, number in enumerate(self.order)}
        pairs = [(a, number) for number in self.order for a in self._ops.ops[number].after if a >= 0]
        assert all(a in place and place[a] < place[number] for a, number in pairs)

    def of(self, lane: Lane) -> list[int]:
        return [number for number in self.order if self._ops.ops[number].kind.lane is lane]


class Slow:
    """A worker whose calls begin, and are known to have ended, some turns of the event loop late."""

    def __init__(self, seed: int, turns: int = 4) -> None:
        self._drawn = Random(seed)
        self._turns = turns

    async def run(self, function: Callable[[], T]) -> T:
        await self._pause()
        try:
            return function()
        finally:
            await self._pause()

    async def _pause(self) -> None:
        for _ in range(self._drawn.randrange(self._turns)):
            await asyncio.sleep(0)


def slow_workers(seed: int) -> dict[Lane, Any]:
    """One lane may be far slower than another."""
    drawn = Random(seed)
    return {lane: Slow(drawn.randrange(2**32), drawn.choice([1, 3, 40])) for lane in Lane}


async def run_lanes(run: StepRun, launch: lanes.Launch, workers: dict[Lane, Any]) -> list[bool | BaseException]:
    """What each lane comes to; that none hangs is checked here, and that each reports its end."""
    async with asyncio.timeout(PATIENCE):
        tasks = (run.run(lane, workers[lane], launch) for lane in Lane)
        found = await asyncio.gather(*tasks, return_exceptions=True)
    told = [run.ended.get_nowait() for _ in Lane]
    assert sorted(told) == sorted(one is True for one in found)
    assert run.ended.empty()
    return found


def runs_of(lists: Sequence[tuple[Carried, OpList]]) -> Iterator[StepRun]:
    """Runs on a CPU; each is given what the one before it has left, once that is over."""
    before: Sequence[Event] = ()
    for _, ops in lists:
        run = StepRun(bare_step(ops), CpuDevice(), before)
        yield run
        before = run.events


@given(chain=chains(), seed=SEEDS)
def test_nothing_is_launched_before_what_it_comes_after(
    chain: tuple[Places, list[tuple[Carried, OpList]]], seed: int
) -> None:
    """Each lane launches all of its operations in the list's order; what is ahead of another waits for it."""
    for run in runs_of(chain[1]):
        ops, launches = run.step.ops, Launches(run.step.ops)
        assert asyncio.run(run_lanes(run, launches, slow_workers(seed))) == [True] * 3
        assert sorted(launches.order) == list(range(len(ops)))
        launches.check()


async def test_nothing_is_launched_too_early_on_threads() -> None:
    """The same with workers as the engine's."""
    for _ in range(20):
        launches = Launches(EXAMPLE)
        async with Worker("a") as one, Worker("b") as two, Worker("c") as three:
            workers = dict(zip(Lane, (one, two, three), strict=True))
            assert await run_lanes(StepRun(bare_step(EXAMPLE), CpuDevice()), launches, workers) == [True] * 3
        assert sorted(launches.order) == list(range(len(EXAMPLE)))
        launches.check()


def ahead(ops: OpList, order: Sequence[int], num_carried: int, layers: Places) -> Iterator[tuple[int, int]]:
    """After each operation: mini-batches whose blocks are loaded or being loaded, and layers whose weights are.

    Counted are those that are not computed yet; weights of the layers carried over are there from the beginning.
    """
    num_batches = 1 + max(op.batch for op in ops.ops)
    streamed = [number for number, layer in enumerate(layers) if layer.bus_bytes]
    attended = finished = loaded = 0
    begun = [(layer, -1) for layer in streamed[:num_carried]]
    for number in order:
        op = ops.ops[number]
        match op.kind:
            case OpKind.LOAD_BLOCKS:
                loaded = op.layer * num_batches + op.batch + 1
            case OpKind.ATTEND:
                attended += 1
            case OpKind.LOAD_WEIGHTS if op.part[0] == 0:
                begun.append((op.layer, op.slot))
            case OpKind.FINISH:
                finished += op.batch == num_batches - 1 and op.layer in streamed
        yield loaded - attended, len(begun) - finished


@given(chain=chains(), seed=SEEDS)
def test_no_lane_is_further_ahead_than_its_buffers(
    chain: tuple[Places, list[tuple[Carried, OpList]]], seed: int
) -> None:
    """Blocks of two mini-batches and weights of two layers are on the device or on their way, never more."""
    layers, lists = chain
    for (carried, ops), run in zip(lists, runs_of(lists), strict=True):
        launches = Launches(ops)
        asyncio.run(run_lanes(run, launches, slow_workers(seed)))
        for blocks, weights in ahead(ops, launches.order, len(carried.loaded), layers):
            assert blocks <= BUFFERS
            assert weights <= BUFFERS


class Gated:
    """A worker whose calls begin once it is let go."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def run(self, function: Callable[[], T]) -> T:
        await self.gate.wait()
        return function()


async def test_loads_fill_their_buffers_while_nothing_is_computed() -> None:
    """They are ahead by all that there is room for; once a buffer is free the next load goes to it."""
    launches, run, gated = Launches(EXAMPLE), StepRun(bare_step(EXAMPLE), CpuDevice()), Gated()
    workers = slow_workers(0) | {Lane.COMPUTE: gated}
    task = asyncio.create_task(run_lanes(run, launches, workers))
    for _ in range(1000):  # far more turns of the loop than all lanes need
        await asyncio.sleep(0)
    ops = [EXAMPLE.ops[number] for number in launches.order]
    loads = [op for op in ops if op.kind is OpKind.LOAD_BLOCKS]
    assert [(op.layer, op.batch, op.slot) for op in loads] == [(0, 0, 0), (0, 1, 1)]
    weights = [op for op in ops if op.kind is OpKind.LOAD_WEIGHTS]
    assert [(op.layer, op.slot) for op in weights] == [(0, 0), (2, 1)]
    assert len(ops) == len(loads) + len(weights)
    gated.gate.set()
    assert await task == [True] * 3


def assert_little_is_late(late: Sequence[int]) -> None:
    """What is launched after a stop is, in each lane, what its worker was at: of one place."""
    for lane in Lane:
        assert len({EXAMPLE.ops[number].place for number in late if number in EXAMPLE.lanes[lane]}) <= 1


@pytest.mark.parametrize("seed", range(4))
async def test_a_stop_at_any_operation_ends_all_lanes(seed: int) -> None:
    """Whichever lane is where: each ends with what it is launching, and says that this is not all of it."""
    for at in range(len(EXAMPLE)):
        step = bare_step(EXAMPLE)

        def stop(number: int, at: int = at, step: Any = step) -> None:
            if number == at:
                step.stop.set()

        launches = Launches(EXAMPLE, stop)
        found = await run_lanes(StepRun(step, CpuDevice()), launches, slow_workers(seed))
        launches.check()
        assert found == [launches.of(lane) == list(EXAMPLE.lanes[lane]) for lane in Lane]
        assert_little_is_late(launches.order[launches.order.index(at) :])


async def test_a_stop_from_outside_ends_all_lanes() -> None:
    """At any turn of the event loop, wherever the lanes are then."""
    for turns in range(60):
        step, launches = bare_step(EXAMPLE), Launches(EXAMPLE)
        running = asyncio.create_task(run_lanes(StepRun(step, CpuDevice()), launches, slow_workers(turns)))
        for _ in range(turns):
            await asyncio.sleep(0)
        step.stop.set()
        before = len(launches.order)
        assert await running == [launches.of(lane) == list(EXAMPLE.lanes[lane]) for lane in Lane]
        launches.check()
        assert_little_is_late(launches.order[before:])


async def test_a_step_that_is_stopped_before_it_begins_launches_nothing() -> None:
    """In lanes and on one thread."""
    step, launches = bare_step(EXAMPLE), Launches(EXAMPLE)
    step.stop.set()
    assert await run_lanes(StepRun(step, CpuDevice()), launches, slow_workers(0)) == [False] * 3
    assert not StepRun(step, CpuDevice()).run_here(launches)
    assert launches.order == []


@pytest.mark.parametrize("seed", range(4))
async def test_an_error_at_any_operation_ends_the_other_lanes(seed: int) -> None:
    """It comes out of the lane that had it; the others do not wait for what will never be launched."""
    for at, op in enumerate(EXAMPLE.ops):

        def fail(number: int, at: int = at) -> None:
            if number == at:
                raise torch.OutOfMemoryError("no memory")

        launches = Launches(EXAMPLE, fail)
        found = await run_lanes(StepRun(bare_step(EXAMPLE), CpuDevice()), launches, slow_workers(seed))
        launches.check()
        failed = found[op.kind.lane]
        assert isinstance(failed, torch.OutOfMemoryError)
        assert launches.of(op.kind.lane)[-1] == at
        for lane in set(Lane) - {op.kind.lane}:
            assert found[lane] == (launches.of(lane) == list(EXAMPLE.lanes[lane]))


async def test_a_lane_that_is_cancelled_ends_the_others() -> None:
    """As the engine ends: also while its worker is busy, and while it waits for another lane."""
    for cancelled in Lane:
        for turns in range(1, 60, 3):
            run, launches, workers = StepRun(bare_step(EXAMPLE), CpuDevice()), Launches(EXAMPLE), slow_workers(turns)
            tasks = [asyncio.create_task(run.run(lane, workers[lane], launches)) for lane in Lane]
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[cancelled].cancel()
            done, pending = await asyncio.wait(tasks, timeout=PATIENCE)
            assert not pending
            assert len(done) == run.ended.qsize() == len(Lane)


@given(chain=chains())
def test_on_one_thread_the_order_is_the_lists(chain: tuple[Places, list[tuple[Carried, OpList]]]) -> None:
    """All of it."""
    for run in runs_of(chain[1]):
        launches = Launches(run.step.ops)
        assert run.run_here(launches)
        assert launches.order == list(range(len(run.step.ops)))


def test_a_stop_on_one_thread_ends_with_what_is_launched() -> None:
    """The layer of a mini-batch, as far as the list has its operations together."""
    for at in range(len(EXAMPLE)):
        step = bare_step(EXAMPLE)
        launches = Launches(EXAMPLE, lambda number, at=at, step=step: step.stop.set() if number == at else None)
        is_whole = StepRun(step, CpuDevice()).run_here(launches)
        assert launches.order == list(range(len(launches.order)))
        assert is_whole == (len(launches.order) == len(EXAMPLE))
        assert {EXAMPLE.ops[number].place for number in launches.order[at:]} == {EXAMPLE.ops[at].place}


class NotingDevice(CpuDevice):
    """Notes waits and events, in order; an event is its stream and its number."""

    def __init__(self) -> None:
        super().__init__()
        self.load, self.gather, self.compute, self.store = "load", "gather", "compute", "store"
        self.notes: list[tuple[object, ...]] = []
        self.current: object = None
        self._num_events = 0

    @contextmanager
    def _entered(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return self._entered(stream)

    def record(self, stream: Stream) -> Event:
        self._num_events += 1
        self.notes.append(("record", stream, self._num_events))
        return stream, self._num_events

    def wait(self, stream: Stream, event: Event) -> None:
        self.notes.append(("wait", stream, event))


def run_noted(run: StepRun, device: NotingDevice, seed: int) -> None:
    """Launches go to the device's notes too."""
    launches = Launches(run.step.ops, lambda number: device.notes.append(("launch", device.current, number)))
    asyncio.run(run_lanes(run, launches, slow_workers(seed)))


def waits_before(device: NotingDevice) -> dict[int, tuple[object, set[object]]]:
    """For each operation its stream, and events that this is made to wait for just before it."""
    found, events = {}, set()
    for what, stream, value in device.notes:
        if what == "launch":
            found[value] = stream, events
            events = set()
        elif what == "wait":
            events.add(value)
    return found


@given(chain=chains(), seed=SEEDS)
def test_operations_wait_for_the_events_of_other_streams(
    chain: tuple[Places, list[tuple[Carried, OpList]]], seed: int
) -> None:
    """On its kind's stream, each waits for those that it comes after, and in a list that goes on for those before."""
    device, before = NotingDevice(), []
    for carried, ops in chain[1]:
        device.notes.clear()
        run = StepRun(bare_step(ops), device, before if carried.loaded else ())
        run_noted(run, device, seed)
        for number, (stream, events) in waits_before(device).items():
            kind = ops.ops[number].kind
            assert stream == kind.stream.value
            wanted = [a for a in ops.ops[number].after if a < 0 or ops.ops[a].kind.stream is not kind.stream]
            assert events == {before[a] if a < 0 else run.events[a] for a in wanted}
            assert None not in events
        assert {number for number, event in enumerate(run.events) if event is not None} == ops.awaited
        before = run.events


@pytest.mark.parametrize("here", [True, False])
def test_no_load_begins_before_the_barrier(here: bool) -> None:
    """The load stream waits for all that the step before has launched, ahead of the first load of either lane."""
    device = NotingDevice()
    run = StepRun(bare_step(EXAMPLE), device, barrier=("x", "y"))
    if here:
        assert run.run_here(lambda op: device.notes.append(("launch", device.current, op.kind)))
        assert device.notes[:2] == [("wait", "load", "x"), ("wait", "load", "y")]
        assert device.notes.count(("wait", "load", "x")) == 1
    else:
        run_noted(run, device, 0)
        first = next(i for i, note in enumerate(device.notes) if note[:2] == ("launch", "load"))
        assert {("wait", "load", "x"), ("wait", "load", "y")} <= set(device.notes[:first])


class Memory:
    """Buffers as the engine has them, in which an operation leaves its mark, and pools of blocks on the host."""

    def __init__(self, device: Device, layers: Places) -> None:
        self.wrong: list[tuple[OpKind, torch.Tensor, int]] = []
        self._device = device
        self._layers = layers
        self._weights, self._blocks = ([self._buffer() for _ in range(BUFFERS)] for _ in range(2))
        self._decoded = self._weights_of_layer = self._buffer()
        self._resident = [self._buffer().fill_(number) for number in range(len(layers))]
        self._pools = [device.pinned(64, HostUse.CACHE_BLOCKS).view(8, 8) for _ in layers]
        for number, pool in enumerate(self._pools):
            pool.copy_((16 * number + torch.arange(8)).view(8, 1).expand(8, 8))
        self._out: dict[int, torch.Tensor] = {}
        self._read: list[tuple[OpKind, torch.Tensor, int]] = []
        device.drain()

    def _buffer(self) -> torch.Tensor:
        return self._device.empty((8,), torch.uint8, DeviceUse.WORKSPACE)

    @property
    def mistakes(self) -> list[tuple[OpKind, list[int], int]]:
        """What operations read that was not what they should."""
        return [(kind, found.tolist(), mark) for kind, found, mark in self._read if not bool((found == mark).all())]

    def launch(self, op: Op, batches: Sequence[BatchShape]) -> None:
        """Touch what an operation of this kind touches."""
        match op.kind:
            case OpKind.LOAD_WEIGHTS:
                size = self._layers[op.layer].bus_bytes
                start, end = (8 * byte // size for byte in op.part)
                self._weights[op.slot][start:end].fill_(op.layer)
            case OpKind.LOAD_BLOCKS:
                self._blocks[op.slot].copy_(self._pools[op.layer][op.batch])
            case OpKind.DECODE if op.slot >= 0:
                self._decoded.copy_(self._weights[op.slot])
            case OpKind.DECODE:
                self._decoded.copy_(self._resident[op.layer])
            case OpKind.PROJECT:
                self._weights_of_layer = self._weights_read(op)
                self._look(op, self._weights_of_layer, op.layer)
            case OpKind.PLACE if not batches[op.batch].loads:
                self._blocks[op.slot].fill_(16 * op.layer + op.batch)
            case OpKind.REBUILD | OpKind.FINISH:
                self._look(op, self._weights_of_layer, op.layer)
            case OpKind.ATTEND:
                self._look(op, self._blocks[op.slot], 16 * op.layer + op.batch)
                self._out[op.batch] = self._blocks[op.slot].clone()
            case OpKind.STORE:
                self._pools[op.layer][op.batch].copy_(self._out[op.batch])
                self._device.keep(self._out[op.batch], self._device.store)

    def _weights_read(self, op: Op) -> torch.Tensor:
        if self._layers[op.layer].is_coded:
            return self._decoded
        return self._weights[op.slot] if op.slot >= 0 else self._resident[op.layer]

    def _look(self, op: Op, buffer: torch.Tensor, mark: int) -> None:
        self._read.append((op.kind, buffer.clone(), mark))


def run_in_memory(layers: Places, chain: Sequence[tuple[OpList, Sequence[BatchShape]]], seed: int) -> OrderedDevice:
    """Run lists one after the other, each whole, as the executor does; contents are checked at the end."""
    device = OrderedDevice()
    memory, before, barrier = Memory(device, layers), (), ()
    for ops, batches in chain:
        run = StepRun(bare_step(ops), device, before, barrier)

        def launch(op: Op, batches: Sequence[BatchShape] = batches) -> None:
            nonlocal barrier
            memory.launch(op, batches)
            if op.kind is OpKind.SAMPLE:
                barrier = device.record(device.compute), device.record(device.store)

        assert asyncio.run(run_lanes(run, launch, slow_workers(seed))) == [True] * 3
        before = run.events
    assert memory.mistakes == []
    return device


@st.composite
def whole_chains(draw: st.DrawFn) -> tuple[Places, list[tuple[OpList, Sequence[BatchShape]]]]:
    layers, carried, found = tuple(draw(LAYERS)), NOTHING_CARRIED, []
    for shapes in draw(st.lists(SHAPES, min_size=1, max_size=3)):
        batches = groups_of(shapes)
        found.append((sweep(layers, batches, carried), batches))
        carried = found[-1][0].carries
    return layers, found


@settings(max_examples=50)
@given(chain=whole_chains(), seed=SEEDS)
def test_each_operation_reads_what_was_meant_for_it(
    chain: tuple[Places, list[tuple[OpList, Sequence[BatchShape]]]], seed: int
) -> None:
    """Its layer's weights and its mini-batch's blocks, whatever the lanes' pace, and events order all accesses."""
    assert run_in_memory(*chain, seed).races == []


def test_without_events_accesses_are_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before this one sees it."""
    monkeypatch.setattr(lanes, "crosses", lambda *_: False)
    assert run_in_memory((STREAMED, STREAMED), [(sweep((STREAMED,) * 2, (EVERYTHING,)), (EVERYTHING,))], 0).races != []


class Inbox(asyncio.Queue[Any]):
    """Knows how many messages were in it at once."""

    made: list[Inbox]

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self.most = 0
        if not maxsize:
            self.made.append(self)

    def put_nowait(self, item: object) -> None:
        super().put_nowait(item)
        self.most = max(self.most, self.qsize())


def inbox_bounds() -> dict[Lane, int]:
    """Messages that a lane may find at most, where it is slow: with each lane's last one, that it has ended.

    The compute lane: loads are ahead of it by their buffers, and each is one message. The cache lane: who computes goes
    on until it needs the blocks that are not loaded yet, which leaves as many mini-batches as there are buffers; and
    the weights' last part, behind which its own turn comes. The weights' lane: the blocks behind which its parts go are
    ahead of it by their buffers, since those behind wait for their turn, and as many layers may be finished.
    """
    ends = len(Lane) - 1
    return {
        Lane.WEIGHTS: 2 * BUFFERS + ends,
        Lane.CACHE: BUFFERS + 1 + ends,
        Lane.COMPUTE: 2 * BUFFERS + ends,
    }


def most_messages(run: Callable[[], StepRun], workers: dict[Lane, Any]) -> dict[Lane, int]:
    """In each lane's inbox at once, in a run that is made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "asyncio", SimpleNamespace(Queue=Inbox))
        Inbox.made = []
        made = run()
    asyncio.run(run_lanes(made, Launches(made.step.ops), workers))
    return dict(zip(Lane, [inbox.most for inbox in Inbox.made], strict=True))


@given(chain=chains(), seed=SEEDS)
def test_messages_between_lanes_are_bounded(chain: tuple[Places, list[tuple[Carried, OpList]]], seed: int) -> None:
    """By buffers and parts."""
    for carried, ops in chain[1]:
        before: list[Event] = [None] * -min(carried.loaded, default=0)
        run = partial(StepRun, bare_step(ops), CpuDevice(), before)
        found = most_messages(run, slow_workers(seed))
        assert all(found[lane] <= bound for lane, bound in inbox_bounds().items())


@pytest.mark.parametrize("lane", Lane)
def test_messages_do_not_grow_with_a_step(lane: Lane) -> None:
    """The inbox of a lane far slower than the others is as full with 64 layers as with 8, and half full at least."""
    shapes = (EVERYTHING, EVERYTHING._replace(group=1), EVERYTHING._replace(group=1))
    found = []
    for repeats in (2, 16):
        ops = sweep((STREAMED, LayerPlacement(), STREAMED, STREAMED) * repeats, shapes)
        workers = {other: Slow(0, 300 if other is lane else 1) for other in Lane}
        found.append(most_messages(partial(StepRun, bare_step(ops), CpuDevice()), workers)[lane])
    assert found[0] == found[1]
    assert inbox_bounds()[lane] / 2 <= found[0] <= inbox_bounds()[lane]
