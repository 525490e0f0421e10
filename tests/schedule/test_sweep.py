"""The list of a step, with ints alone: nothing is overwritten before its last reader, the bus never idle in vain."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.schedule import sweep as sweeps
from hsrpc.schedule.simulate import simulate
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
    Stream,
    sweep,
)

MIB = 2**20
READS_WEIGHTS = {
    OpKind.DECODE,
    OpKind.PROJECT,
    OpKind.REBUILD,
    OpKind.ROUTE,
    OpKind.DECODE_EXPERTS,
    OpKind.FINISH,
}
FILLS = {OpKind.LOAD_WEIGHTS, OpKind.GATHER, OpKind.GATHER_SPREAD}
READS_BLOCKS = {OpKind.REBUILD, OpKind.ATTEND}

placements = st.builds(
    LayerPlacement,
    bus_bytes=st.sampled_from((0, 1, 5 * MIB, 40 * MIB, 300 * MIB)),
    is_coded=st.booleans(),
    has_coded_experts=st.booleans(),
    rebuilds=st.booleans(),
    on_demand=st.booleans(),
    is_gathered=st.just(False),
    spread_bytes=st.just(0),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[BatchShape, ...]:
    group, found = 0, []
    for _ in range(draw(st.integers(1, 5))):
        loads, rebuilds, stores, scores = (draw(st.booleans()) for _ in range(4))
        found.append(BatchShape(group, loads, rebuilds, stores, scores))
        group += draw(st.integers(0, 1))
    return tuple(found)


models = st.lists(placements, min_size=1, max_size=7).map(tuple)


def gathered(layers: Places, spread: list[int]) -> Places:
    """The same of one of several GPUs, which load parts for each other, hold what is `spread`, or do both.

    Experts do not come on demand there.
    """
    both = (layer._replace(on_demand=False, spread_bytes=held) for layer, held in zip(layers, spread, strict=False))
    return tuple(layer._replace(is_gathered=layer.is_streamed) for layer in both)


of_several = st.builds(gathered, models, st.lists(st.sampled_from((0, 0, 256, 60 * MIB)), min_size=7, max_size=7))


def begins(op: Op, layers: Places) -> bool:
    """Whether it is the first to write a layer's weights to their buffer."""
    is_first_load = op.kind is OpKind.LOAD_WEIGHTS and op.part[0] == 0
    return op.kind is OpKind.GATHER_SPREAD or (is_first_load and not layers[op.layer].spread_bytes)


@dataclass(frozen=True)
class Steps:
    """Several lists, one behind the other, as one device sees them: operations by (list, number)."""

    layers: Places
    lists: tuple[OpList, ...]

    @property
    def ops(self) -> Iterator[tuple[tuple[int, int], Op]]:
        return (((step, number), op) for step, ops in enumerate(self.lists) for number, op in enumerate(ops.ops))

    def before(self) -> dict[tuple[int, int], set[tuple[int, int]]]:
        """For each operation all that are done when it begins: by order of its stream, and by what it comes after.

        A step's loads come after all that the step before has computed and stored (the executor's barrier).
        """
        done: dict[tuple[int, int], set[tuple[int, int]]] = {}
        latest: dict[Stream, tuple[int, int]] = {}
        barrier: set[tuple[int, int]] = set()
        for step, ops in enumerate(self.lists):
            for number, op in enumerate(ops.ops):
                direct = {(step, a) if a >= 0 else (step - 1, len(self.lists[step - 1]) + a) for a in op.after}
                if op.kind.stream in latest:
                    direct.add(latest[op.kind.stream])
                found = set(direct) | barrier
                for each in direct:
                    found |= done[each]
                done[step, number] = found
                latest[op.kind.stream] = (step, number)
            ended = [
                key for key in done if key[0] == step and ops.ops[key[1]].kind.stream in (Stream.COMPUTE, Stream.STORE)
            ]
            barrier = barrier | set(ended).union(*(done[key] for key in ended))
        return done


@st.composite
def steps(draw: st.DrawFn) -> Steps:
    layers, carried, lists = draw(models | of_several), NOTHING_CARRIED, []
    idle = any(layer.is_gathered for layer in layers)
    for _ in range(draw(st.integers(1, 3))):
        lists.append(sweep(layers, draw(batches() | st.just(()) if idle else batches()), carried))
        carried = lists[-1].carries
    return Steps(layers, tuple(lists))


@given(run=steps())
def test_every_operation_is_behind_those_that_it_comes_after(run: Steps) -> None:
    """Below 0 stand loads and gathers of weights of the list before, for other streams than those, and nothing else."""
    for (step, number), op in run.ops:
        for after in op.after:
            assert after < number
            if after < 0:
                kind = run.lists[step - 1].ops[after].kind
                assert kind in FILLS
                assert kind.stream is not op.kind.stream


@given(run=steps())
def test_each_lane_has_its_operations_in_order(run: Steps) -> None:
    """All lanes together have each operation once; a lane's mini-batches come in order, layer by layer."""
    for ops in run.lists:
        assert sorted(number for lane in ops.lanes for number in lane) == list(range(len(ops)))
        for lane in Lane:
            of_layers = (ops.ops[number] for number in ops.lanes[lane] if ops.ops[number].layer >= 0)
            places = [op.place for op in of_layers if op.batch >= 0]
            assert places == sorted(places)


@given(run=steps())
@settings(max_examples=60)
def test_a_cache_buffer_is_not_written_before_its_last_reader(run: Steps) -> None:
    """Blocks come when the mini-batch before in that buffer is computed, and are there when their own is."""
    before, holds, used = run.before(), {}, {}
    for key, op in run.ops:
        if op.kind in (OpKind.LOAD_BLOCKS, OpKind.PLACE):
            place = (key[0], *op.place)
            if holds.get(op.slot) != place:
                assert used.get(op.slot, set()) <= before[key]
                holds[op.slot], used[op.slot] = place, set()
        if op.kind in (OpKind.PLACE, *READS_BLOCKS):
            assert holds[op.slot] == (key[0], *op.place)
            used[op.slot].add(key)
            loads = [k for k, o in run.ops if o.kind is OpKind.LOAD_BLOCKS and (k[0], *o.place) == (key[0], *op.place)]
            assert set(loads) <= before[key]


@given(run=steps())
@settings(max_examples=60)
def test_a_weight_buffer_is_not_written_before_its_last_reader(run: Steps) -> None:
    """A layer's weights are whole before they are read, and stay until they have been read for the last time."""
    before = run.before()
    filled: dict[int, tuple[int, dict[OpKind, list[tuple[int, int]]]]] = {}
    uses: dict[int, set[tuple[int, int]]] = {slot: set() for slot in range(BUFFERS)}
    uses_before, slots = dict(uses), dict[int, int]()
    for key, op in run.ops:
        if op.kind in FILLS:
            if begins(op, run.layers):
                filled[op.slot], uses_before[op.slot], uses[op.slot] = (op.layer, {}), uses[op.slot], set()
            layer, fills = filled[op.slot]
            assert layer == op.layer
            assert uses_before[op.slot] <= before[key]
            assert op.kind is not OpKind.GATHER or set(fills[OpKind.LOAD_WEIGHTS]) <= before[key]
            fills.setdefault(op.kind, []).append(key)
            uses[op.slot].add(key)
        elif op.kind in READS_WEIGHTS and run.layers[op.layer].is_streamed:
            slot = slots[op.layer] = op.slot if op.kind in (OpKind.DECODE, OpKind.PROJECT) else slots[op.layer]
            (layer, fills), place = filled[slot], run.layers[op.layer]
            assert layer == op.layer
            assert set().union(*fills.values()) <= before[key]
            assert (OpKind.GATHER in fills) == (place.is_gathered and place.bus_bytes > 0)
            assert (OpKind.GATHER_SPREAD in fills) == (place.spread_bytes > 0)
            parts = fills.get(OpKind.LOAD_WEIGHTS, [])
            ends = [(0, 0), *(run.lists[step].ops[number].part for step, number in parts)]
            assert ends[-1][1] == place.bus_bytes
            assert all(first[1] == second[0] for first, second in pairwise(ends))
            uses[slot].add(key)


@given(run=steps())
def test_each_layer_comes_once_a_step(run: Steps) -> None:
    """What comes ahead does not come again; at a list's end as many layers have come as there are buffers for."""
    streamed = [number for number, layer in enumerate(run.layers) if layer.is_streamed]
    ahead = streamed[:BUFFERS]
    for step, ops in enumerate(run.lists):
        begun = [op.layer for op in ops.ops if begins(op, run.layers)]
        assert begun == (streamed if step == 0 else streamed[len(ahead) :]) + ahead
        assert [ops.ops[number].layer for number in ops.carries.loaded] == ahead
        for number in ops.carries.loaded:
            op = ops.ops[number]
            place = run.layers[op.layer]
            by_bus = OpKind.GATHER if place.is_gathered else OpKind.LOAD_WEIGHTS
            assert op.kind is (by_bus if place.bus_bytes else OpKind.GATHER_SPREAD)
            assert op.part[1] == (place.bus_bytes if op.kind is OpKind.LOAD_WEIGHTS else 0)


@given(run=steps())
def test_what_is_spread_waits_for_no_bus(run: Steps) -> None:
    """It comes as soon as its buffer is free."""
    for ops in run.lists:
        for op in ops.ops:
            if op.kind is OpKind.GATHER_SPREAD:
                assert {ops.ops[number].kind for number in op.after} <= {OpKind.FINISH}


@given(layers=of_several, of_ranks=st.lists(st.lists(st.none() | batches(), min_size=3, max_size=3), min_size=2))
def test_all_gpus_gather_the_same_in_the_same_order(
    layers: Places, of_ranks: list[list[tuple[BatchShape, ...] | None]]
) -> None:
    """Whatever each computes in a step, or whether it has nothing to: else they would wait for each other for ever."""
    gathers = []
    for shapes in of_ranks:
        carried, found = NOTHING_CARRIED, list[tuple[OpKind, int, int]]()
        for each in shapes:
            ops = sweep(layers, each or (), carried)
            found += ((op.kind, op.layer, op.slot) for op in ops.ops if op.kind.stream is Stream.GATHER)
            carried = ops.carries
        gathers.append(found)
    assert all(found == gathers[0] for found in gathers)


@given(layers=of_several)
def test_a_gpu_with_nothing_to_compute_loads_its_part(layers: Places) -> None:
    """And does nothing else but say that it is done."""
    ops = sweep(layers, ())
    assert {op.kind for op in ops.ops} <= FILLS | {OpKind.SAMPLE}
    assert ops.is_gathered == any(layer.is_streamed for layer in layers)


@given(run=steps())
def test_stores_follow_what_they_store(run: Steps) -> None:
    """Rows go to the host once their mini-batch has been attended to; there is one store for each that has any."""
    before = run.before()
    for key, op in run.ops:
        if op.kind is OpKind.STORE:
            ops = run.lists[key[0]].ops
            assert any(ops[a].kind is OpKind.ATTEND and ops[a].place == op.place for _, a in before[key] if _ == key[0])


@given(run=steps())
def test_experts_are_loaded_between_choice_and_use(run: Steps) -> None:
    """For each group of a layer whose experts come on demand: its choice, its experts, its end, one after the other.

    The choice comes after all that uses experts before it: their places may be written over once it is known. Coded
    ones are decoded behind their choice, and behind what brings them.
    """
    before, used = run.before(), set[tuple[int, int]]()
    for key, op in run.ops:
        place = run.layers[op.layer]
        if op.kind is OpKind.ROUTE:
            assert place.on_demand or place.has_coded_experts
        if op.kind is OpKind.LOAD_EXPERTS:
            assert place.on_demand
            (route,) = (a for a in op.after if run.lists[key[0]].ops[a].kind is OpKind.ROUTE)
            assert run.lists[key[0]].ops[route].place == op.place
            assert used <= before[key[0], route]
        first_use = OpKind.DECODE_EXPERTS if place.has_coded_experts else OpKind.FINISH
        if op.kind is first_use and place.on_demand:
            (load,) = op.after
            assert run.lists[key[0]].ops[load][:3] == (OpKind.LOAD_EXPERTS, *op.place)
        if op.kind in (OpKind.DECODE_EXPERTS, OpKind.FINISH) and place.on_demand:
            used.add(key)
    for ops in run.lists:
        kinds = {(op.kind, op.place): number for number, op in enumerate(ops.ops)}
        for (kind, at), number in kinds.items():
            if kind is OpKind.FINISH and run.layers[at[0]].has_coded_experts:
                assert kinds[OpKind.ROUTE, at] < kinds[OpKind.DECODE_EXPERTS, at] < number
            if kind is OpKind.DECODE_EXPERTS:
                assert run.layers[at[0]].has_coded_experts


def test_prompts_are_scored_when_all_layers_are_done() -> None:
    """Each mini-batch that asks, in order, before the logits of what is sampled."""
    shapes = (BatchShape(0, scores=True), BatchShape(0), BatchShape(1, scores=True))
    *layers, first, second, head, sample = sweep((LayerPlacement(), LayerPlacement()), shapes).ops
    assert [(op.kind, op.batch) for op in (first, second)] == [(OpKind.SCORE, 0), (OpKind.SCORE, 2)]
    assert [head.kind, sample.kind] == [OpKind.HEAD, OpKind.SAMPLE]
    assert layers[-1].kind is OpKind.FINISH
    assert not any(op.kind is OpKind.SCORE for op in layers)


def test_weights_that_are_known_to_be_wanted_go_before_experts() -> None:
    """While a layer's choice is awaited, the weights of the next one cross the bus."""
    layers = (LayerPlacement(MIB, on_demand=True),) * 4
    loads = [op for op in sweep(layers, (BatchShape(),)).ops if op.kind.stream is Stream.LOAD]
    order = [(op.kind is OpKind.LOAD_EXPERTS, op.layer) for op in loads]
    assert order.index((False, 2)) < order.index((True, 1))
    assert [layer for is_experts, layer in order if is_experts] == [0, 1, 2, 3]


@given(layers=models, shapes=batches())
def test_what_a_mini_batch_does_not_ask_for_is_not_there(layers: Places, shapes: tuple[BatchShape, ...]) -> None:
    """Loads, rebuilding and stores for those that have any; each group is projected and finished once a layer."""
    found = sweep(layers, shapes).ops
    for layer, place in enumerate(layers):
        kinds = [[op.kind for op in found if op.place == (layer, batch)] for batch in range(len(shapes))]
        for shape, has in zip(shapes, kinds, strict=True):
            assert (OpKind.LOAD_BLOCKS in has) == shape.loads
            assert (OpKind.REBUILD in has) == (shape.rebuilds and place.rebuilds)
            assert (OpKind.STORE in has) == shape.stores
            assert has.count(OpKind.PLACE) == has.count(OpKind.ATTEND) == 1
        groups = len({shape.group for shape in shapes})
        assert (
            sum(has.count(OpKind.PROJECT) for has in kinds) == sum(has.count(OpKind.FINISH) for has in kinds) == groups
        )
        decodes = [op for op in found if op.kind is OpKind.DECODE and op.layer == layer]
        assert len(decodes) == place.is_coded


@given(run=steps())
def test_the_bus_is_taken_in_turns(run: Steps) -> None:
    """Tasks that share it follow one another as the list says: which of them is quicker changes nothing."""
    for ops in run.lists:
        loads = [number for number, op in enumerate(ops.ops) if op.kind.stream is Stream.LOAD]
        for first, second in pairwise(loads):
            assert ops.ops[first].kind.lane is ops.ops[second].kind.lane or first in ops.ops[second].after


@given(run=steps())
def test_the_bus_has_something_to_copy_whenever_it_can(run: Steps) -> None:
    """No operation of the compute lane stands before a load that could have been in its place."""
    for ops in run.lists:
        for number, (op, follower) in enumerate(pairwise(ops.ops)):
            if op.kind.lane is Lane.COMPUTE and follower.kind.stream is Stream.LOAD:
                assert number in follower.after


@given(layers=models, shapes=batches(), data=st.data())
def test_while_the_bus_binds_it_never_waits(
    layers: Places, shapes: tuple[BatchShape, ...], data: st.DataObject
) -> None:
    """With a device that computes in no time, a list takes as long as its copies, however these are divided."""
    load = data.draw(st.floats(0.1, 5.0))

    def seconds(op: Op) -> float:
        if op.kind is OpKind.LOAD_WEIGHTS:
            return (op.part[1] - op.part[0]) / MIB
        return load if op.kind is OpKind.LOAD_BLOCKS else 0.0

    timeline = simulate(sweep(layers, shapes), seconds)
    assert max(timeline.ends) == pytest.approx(timeline.busy[Stream.LOAD])


def test_weights_go_between_the_blocks() -> None:
    """With each mini-batch's blocks an equal part of the next streamed layer's weights, behind them."""
    layers = (LayerPlacement(90 * MIB),) * 4
    ops = sweep(layers, (BatchShape(loads=True),) * 3, Carried(0, (-2, -1))).ops
    order = [(op.kind.value, op.layer, op.batch if op.batch >= 0 else op.part[1] // MIB) for op in ops]
    loads = [each for each in order if each[0].startswith("load")]
    blocks, weights = "load_blocks", "load_weights"
    at = loads.index((weights, 2, 90))
    assert loads[at - 1] == (blocks, 1, 2)
    assert [each[2] for each in loads if each[:2] == (weights, 2)] == [30, 60, 90]
    assert [each[1] for each in loads if each[0] == weights] == [2, 2, 2, 3, 3, 3, 0, 0, 0, 1]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 12345]), min_size=2, max_size=7),
    shapes=st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_no_part_of_the_weights_is_ahead_of_its_blocks(sizes: list[int], shapes: list[bool]) -> None:
    """No part of a layer's weights is ahead of the blocks of the layers before it, and the last follows all of them."""
    batches = tuple(BatchShape(loads=loads) for loads in shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "MIN_PART_BYTES", 1)
        ops = sweep.__wrapped__(tuple(map(LayerPlacement, sizes)), batches, NOTHING_CARRIED).ops
    streamed = [layer for layer, size in enumerate(sizes) if size]
    for begin, layer in pairwise(streamed[1:]):
        parts = [op for op in ops if op.kind is OpKind.LOAD_WEIGHTS and op.layer == layer]
        first, last = begin * len(batches), layer * len(batches)
        sent = 0
        for part in parts:
            blocks = [ops[number] for number in part.after if ops[number].kind is OpKind.LOAD_BLOCKS]
            assert bool(blocks) == any(shapes)
            assert part.part[0] == sent
            sent = part.part[1]
            for block in blocks[:1]:  # another is the one before it on the bus
                done = block.layer * len(batches) + block.batch + 1
                is_last = part is parts[-1]
                assert first < done <= last
                assert is_last or sent == math.ceil(sizes[layer] * (done - first) / (last - first))
        assert sent == sizes[layer]


def test_small_parts_are_joined() -> None:
    """No part but the last is smaller than a copy that is worth its while."""
    layers = (LayerPlacement(2 * MIN_PART_BYTES + 5),) * 3
    ops = sweep(layers, (BatchShape(loads=True),) * 8, Carried(0, (-2, -1))).ops
    parts = [op.part for op in ops if op.kind is OpKind.LOAD_WEIGHTS and op.layer == 2]
    assert [end - start for start, end in parts] == [MIN_PART_BYTES, MIN_PART_BYTES, 5]


def test_layers_without_a_stream_are_skipped() -> None:
    """Weights of a streamed layer go beside the blocks of all layers since the streamed one before."""
    layers = tuple(LayerPlacement(200 * MIB if number in (0, 4) else 0) for number in range(6))
    found = sweep(layers, (BatchShape(loads=True),), Carried(0, (-2, -1)))
    tail = [op for op in found.ops if op.kind is OpKind.LOAD_WEIGHTS]
    assert [(op.layer, op.slot) for op in tail] == [(0, 0), (0, 0), (4, 1)]
    assert sweep(layers, (BatchShape(),)).carries.first_slot == 0


def test_an_odd_number_of_layers_takes_buffers_in_turns() -> None:
    """The first layer's weights are in the other buffer in every second step."""
    layers, carried, slots = (LayerPlacement(MIB),) * 3, NOTHING_CARRIED, []
    for _ in range(4):
        ops = sweep(layers, (BatchShape(),), carried)
        slots.append(next(op.slot for op in ops.ops if op.kind is OpKind.PROJECT))
        carried = ops.carries
    assert slots == [0, 1, 0, 1]


def test_after_an_abandoned_list_nothing_is_carried() -> None:
    """The next one loads all its weights, and waits for nothing of the list before: any prefix can be abandoned."""
    layers = (LayerPlacement(MIB),) * 5
    ops = sweep(layers, (BatchShape(loads=True),) * 2, NOTHING_CARRIED)
    assert all(after >= 0 for op in ops.ops for after in op.after)
    assert {op.layer for op in ops.ops if op.kind is OpKind.LOAD_WEIGHTS} == set(range(5))


@given(run=steps())
@settings(max_examples=20)
def test_a_list_is_plain_data(run: Steps) -> None:
    """It is the same for the same numbers, and can be sent to another process."""
    ops = run.lists[0]
    assert pickle.loads(pickle.dumps(ops)) == ops
    assert hash(ops.ops) == hash(pickle.loads(pickle.dumps(ops)).ops)


@given(run=steps())
def test_who_is_told_and_what_is_recorded(run: Steps) -> None:
    """An event for each operation that one of another stream waits for, a message for each lane that waits for it."""
    for ops in run.lists:
        carried = {len(ops) + number for number in ops.carries.loaded}
        for number, op in enumerate(ops.ops):
            waiting = [later for later in ops.ops if number in later.after]
            crosses = any(later.kind.stream is not op.kind.stream for later in waiting)
            assert (number in ops.awaited) == (crosses or number in carried)
            lanes = {later.kind.lane for later in waiting} - {op.kind.lane}
            assert ops.readers[number] == tuple(sorted(lanes))
