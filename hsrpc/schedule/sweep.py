"""A step's operations as one list: what each lane launches, in which order, into which buffer, and after what.

The order of a step exists here and nowhere else. The three tasks run their lanes of the list, CUDA graphs are captured
from its compute lane, a step without streaming is the list run on one thread, and the planner simulates it. All are
numbers: nothing here knows of requests, tensors or threads.

A layer is computed mini-batch by mini-batch. The n-th mini-batch of a step, counted through its layers, uses cache
buffer `n mod 2`; the j-th streamed layer uses weight buffer `j mod 2`, counted on from step to step. Weights of the
next step's first layers are the tail of this step's list.

Where experts come on demand, or have to be decoded, a layer is finished in two: the router chooses, and what it chose
is loaded and decoded, before the rest is computed. Weights that are known to be wanted go before them.

The bus takes blocks and weights in turns: between the blocks of two mini-batches goes a part of the weights that are
wanted next. Blocks are wanted at once, and their buffers come free while the layer computes; weights are wanted a layer
later. Sent whole, a layer's weights would keep the blocks waiting, and then the bus would wait for the blocks' buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

BUFFERS = 2
"""Device buffers of each sort: one is filled while the other is computed with."""
MIN_PART_BYTES = 16 * 1024**2
"""Bytes of one part of a layer's weights, at least: smaller copies waste the bus."""


class Lane(IntEnum):
    """The task that launches an operation."""

    WEIGHTS = 0
    CACHE = 1
    COMPUTE = 2


class Stream(Enum):
    """The device's queue that an operation is launched on."""

    LOAD = "load"
    GATHER = "gather"
    COMPUTE = "compute"
    STORE = "store"


class OpKind(Enum):
    """What an operation does; its value names its range in a profile."""

    LOAD_WEIGHTS = "load_weights"
    """A part of a layer's weights, from pinned memory to a weight buffer."""
    GATHER = "gather"
    """A layer's weights of which each of several GPUs has loaded a part: each gets the other parts."""
    GATHER_SPREAD = "gather_spread"
    """Those of which each of several GPUs holds a piece on its device: each gets all pieces, and none crosses a bus."""
    LOAD_BLOCKS = "load_blocks"
    """A mini-batch's cached rows of a layer, from the host's pools to a cache buffer."""
    LOAD_EXPERTS = "load_experts"
    """The experts that a group of mini-batches needs of a layer and that are not on the device; the host waits for the
    router's choice."""
    EMBED = "embed"
    """The step's arrays to the device, and the input of the first layer."""
    DECODE = "decode"
    """Weights of a layer that came coded, lie so on the device, or are coded to be multiplied, made ready for use; all
    but experts."""
    DECODE_EXPERTS = "decode_experts"
    """The same of the experts that a group of mini-batches needs of a layer."""
    PROJECT = "project"
    """Queries, keys and values of a group of mini-batches."""
    PLACE = "place"
    """A mini-batch's rows that are on the device already: new ones, and those of the device's pools."""
    REBUILD = "rebuild"
    """K and V of cached activations."""
    ATTEND = "attend"
    """A mini-batch's attention."""
    ROUTE = "route"
    """A group of mini-batches after attention, up to the choice of experts, which goes to the host."""
    FINISH = "finish"
    """The rest of a layer for a group of mini-batches."""
    STORE = "store"
    """A mini-batch's new rows of a layer, to the host's pools."""
    SCORE = "score"
    """Log-probabilities of a mini-batch's prompt tokens, where they are wanted."""
    HEAD = "head"
    """Logits of the rows that are sampled."""
    SAMPLE = "sample"
    """Tokens, on the host."""

    @property
    def lane(self) -> Lane:
        return _LANES.get(self, Lane.COMPUTE)

    @property
    def stream(self) -> Stream:
        return _STREAMS.get(self, Stream.COMPUTE)


_LANES = {
    OpKind.LOAD_WEIGHTS: Lane.WEIGHTS,
    OpKind.GATHER: Lane.WEIGHTS,
    OpKind.GATHER_SPREAD: Lane.WEIGHTS,
    OpKind.LOAD_EXPERTS: Lane.WEIGHTS,
    OpKind.LOAD_BLOCKS: Lane.CACHE,
}
_STREAMS = {
    OpKind.LOAD_WEIGHTS: Stream.LOAD,
    OpKind.GATHER: Stream.GATHER,
    OpKind.GATHER_SPREAD: Stream.GATHER,
    OpKind.LOAD_EXPERTS: Stream.LOAD,
    OpKind.LOAD_BLOCKS: Stream.LOAD,
    OpKind.STORE: Stream.STORE,
}


class Op(NamedTuple):
    """One operation of a step. Fields that its kind has no use for are -1."""

    kind: OpKind
    layer: int = -1
    batch: int = -1
    """Mini-batch; of a group the first for PROJECT, the last for ROUTE, LOAD_EXPERTS, DECODE_EXPERTS and FINISH."""
    slot: int = -1
    """Weight buffer (LOAD_WEIGHTS, GATHER, GATHER_SPREAD, DECODE, PROJECT) or cache buffer (LOAD_BLOCKS, PLACE,
    REBUILD, ATTEND)."""
    part: tuple[int, int] = (0, 0)
    """First byte and end, of what this GPU loads of a layer's weights (LOAD_WEIGHTS)."""
    after: tuple[int, ...] = ()
    """Numbers of the operations of other lanes or streams that come first; below 0: from the end of the list before."""

    @property
    def place(self) -> tuple[int, int]:
        """What a lane launches in one go has the same."""
        return self.layer, self.batch


class LayerPlacement(NamedTuple):
    """Where the weights of a layer are."""

    bus_bytes: int = 0
    """Bytes that cross this GPU's bus in every step; 0 where all lie on the devices."""
    is_coded: bool = False
    """Some weights are decoded, or coded, before they are used: of those that cross the bus, or of those on the device.
    Experts are not among them."""
    has_coded_experts: bool = False
    """Its experts are decoded once they are chosen."""
    rebuilds: bool = True
    """Activation blocks hold activations in this layer; else K and V, of which nothing is to be rebuilt."""
    on_demand: bool = False
    """Its experts come once they are chosen; they are not among the `bus_bytes`."""
    is_gathered: bool = False
    """The `bus_bytes` are a part of those that stream, and other GPUs load the others."""
    spread_bytes: int = 0
    """Bytes that this GPU holds on its device for all of several; each gets those of all in every step."""

    @property
    def is_streamed(self) -> bool:
        """Weights come to a buffer in every step, over the bus or from the devices that hold them."""
        return self.bus_bytes > 0 or self.spread_bytes > 0


class BatchShape(NamedTuple):
    """What a mini-batch asks of a sweep."""

    group: int = 0
    """Neighbours of one number go through projections and MLP together."""
    loads: bool = False
    """Some of its cached rows come from the host."""
    rebuilds: bool = False
    """It has cached activations."""
    stores: bool = False
    """Some of its new rows go to the host."""
    scores: bool = False
    """Log-probabilities of its prompt tokens are wanted."""


class Carried(NamedTuple):
    """What the list before has left in the weight buffers; nothing where it was abandoned."""

    first_slot: int = 0
    """Weight buffer of the first streamed layer."""
    loaded: tuple[int, ...] = ()
    """Operation that completes each of the first streamed layers, counted from the end of the list before."""


NOTHING_CARRIED = Carried()
Places: TypeAlias = tuple[LayerPlacement, ...]


@dataclass(frozen=True)
class OpList:
    """All operations of a step, each behind those that it comes after."""

    ops: tuple[Op, ...]
    carries: Carried
    """What is left to the next list, where this one is run to its end."""

    def __len__(self) -> int:
        return len(self.ops)

    @cached_property
    def lanes(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of each lane's operations, in order."""
        return tuple(tuple(i for i, op in enumerate(self.ops) if op.kind.lane is lane) for lane in Lane)

    @cached_property
    def is_gathered(self) -> bool:
        """Other GPUs wait for what this one has: it is run to its end, even where nobody waits for its tokens."""
        return any(op.kind.stream is Stream.GATHER for op in self.ops)

    @cached_property
    def group_starts(self) -> tuple[int, ...]:
        """Mini-batches that begin a group."""
        return tuple(op.batch for op in self.ops if op.kind is OpKind.PROJECT and op.layer == 0)

    @cached_property
    def awaited(self) -> frozenset[int]:
        """Operations that one of another stream waits for, and those that the next list may wait for."""
        found = {a for op in self.ops for a in op.after if a >= 0 and self.ops[a].kind.stream is not op.kind.stream}
        return frozenset(found | {len(self.ops) + number for number in self.carries.loaded})

    @cached_property
    def readers(self) -> tuple[tuple[Lane, ...], ...]:
        """Other lanes that have operations behind each operation."""
        lanes: list[set[Lane]] = [set() for _ in self.ops]
        for op in self.ops:
            for number in op.after:
                if number >= 0 and self.ops[number].kind.lane is not op.kind.lane:
                    lanes[number].add(op.kind.lane)
        return tuple(tuple(sorted(each)) for each in lanes)


@lru_cache(maxsize=64)
def sweep(layers: Places, batches: tuple[BatchShape, ...], carried: Carried = NOTHING_CARRIED) -> OpList:
    """The list of a step of these mini-batches through these layers.

    Without mini-batches the weights sweep alone: where GPUs load parts for each other, one with nothing to compute does
    its part of every layer, in the order of the others.
    """
    builder = _Builder(layers, batches, carried)
    if batches:
        builder.compute(OpKind.EMBED)
    for layer in range(len(layers)):
        builder.layer(layer)
    for batch, shape in enumerate(batches):
        if shape.scores:
            builder.compute(OpKind.SCORE, batch)
    if batches:
        builder.compute(OpKind.HEAD)
    builder.compute(OpKind.SAMPLE)
    builder.tail()
    return builder.merged()


class _Queue(IntEnum):
    """Operations of one order among themselves; where several could be next, that of the smallest number is."""

    BLOCKS = 0
    EXPERTS = 1
    WEIGHTS = 2
    COMPUTE = 3


_QUEUES = {
    OpKind.LOAD_BLOCKS: _Queue.BLOCKS,
    OpKind.LOAD_EXPERTS: _Queue.EXPERTS,
    OpKind.LOAD_WEIGHTS: _Queue.WEIGHTS,
    OpKind.GATHER: _Queue.WEIGHTS,
    OpKind.GATHER_SPREAD: _Queue.WEIGHTS,
}


class _Ref(NamedTuple):
    """An operation by its place in its queue; those of the list before have no queue and a number below 0."""

    queue: _Queue | None
    number: int


class _Builder:
    """Fills the queues, then makes one list of them."""

    def __init__(self, layers: Places, batches: tuple[BatchShape, ...], carried: Carried) -> None:
        self._layers = layers
        self._batches = batches
        self._carried = carried
        self._queues: dict[_Queue, list[tuple[Op, tuple[_Ref, ...]]]] = {queue: [] for queue in _Queue}
        self._streamed = [number for number, layer in enumerate(layers) if layer.is_streamed]
        loading = [n for n in range(len(layers) * len(batches)) if batches[n % len(batches)].loads]
        self._loads = {n: _Ref(_Queue.BLOCKS, number) for number, n in enumerate(loading)}
        """Loads of blocks by the number n of the mini-batch in the step."""
        self._attends: list[_Ref] = []
        self._finishes: list[_Ref] = []
        """The last of each layer."""
        self._weights: list[_Ref] = []
        """What completes each streamed layer, on through the next step's first ones."""

    def compute(self, kind: OpKind, batch: int = -1) -> _Ref:
        """An operation outside the layers, for the whole step or for a mini-batch."""
        return self._add(Op(kind, batch=batch))

    def layer(self, layer: int) -> None:
        """All of a layer, and its weights."""
        weights = self._layer_weights(layer)
        slot = self._slot(len(self._weights) - 1) if weights else -1
        if self._layers[layer].is_coded and self._batches:
            self._add(Op(OpKind.DECODE, layer, slot=slot), *weights)
            weights = ()  # what follows on the same stream needs not wait for them again
        for batch in range(len(self._batches)):
            self._mini_batch(layer, batch, slot, weights)
            weights = ()

    def tail(self) -> None:
        """Weights of the next step's first layers, as far as there are buffers."""
        for number, layer in enumerate(self._streamed[:BUFFERS]):
            latest = [(1.0, self._loads[max(self._loads)])] if self._loads else []
            self._load_weights(layer, latest if number else self._between(self._streamed[-1], len(self._layers)))

    def merged(self) -> OpList:
        """One list: loads as early as what they come after allows, blocks before weights, and in this order."""
        numbers: dict[_Ref, int] = {}
        done = dict.fromkeys(_Queue, 0)
        ops: list[Op] = []
        last_load: int | None = None
        while len(ops) < sum(map(len, self._queues.values())):
            queue = next(queue for queue in _Queue if self._is_ready(queue, done))
            op, refs = self._queues[queue][done[queue]]
            after = {ref.number if ref.queue is None else numbers[ref] for ref in refs}
            if op.kind.stream is Stream.LOAD:  # the tasks that share the bus take their turns
                if last_load is not None and ops[last_load].kind.lane is not op.kind.lane:
                    after.add(last_load)
                last_load = len(ops)
            numbers[_Ref(queue, done[queue])] = len(ops)
            done[queue] += 1
            ops.append(op._replace(after=tuple(sorted(after))))
        num_streamed = len(self._streamed)
        loaded = tuple(numbers[ref] - len(ops) for ref in self._weights[num_streamed:])
        return OpList(tuple(ops), Carried(self._slot(num_streamed), loaded))

    def _is_ready(self, queue: _Queue, done: dict[_Queue, int]) -> bool:
        if done[queue] == len(self._queues[queue]):
            return False
        _, after = self._queues[queue][done[queue]]
        return all(ref.queue is None or ref.number < done[ref.queue] for ref in after)

    def _add(self, op: Op, *after: _Ref) -> _Ref:
        name = _QUEUES.get(op.kind, _Queue.COMPUTE)
        queue = self._queues[name]
        queue.append((op, after))
        return _Ref(name, len(queue) - 1)

    def _slot(self, number: int) -> int:
        """Weight buffer of the streamed layer of that number."""
        return (self._carried.first_slot + number) % BUFFERS

    def _mini_batch(self, layer: int, batch: int, weight_slot: int, weights: tuple[_Ref, ...]) -> None:
        shape, n = self._batches[batch], len(self._attends)
        slot = n % BUFFERS
        is_first = batch == 0 or self._batches[batch - 1].group != shape.group
        is_last = batch == len(self._batches) - 1 or self._batches[batch + 1].group != shape.group
        if shape.loads:
            free = self._attends[n - BUFFERS : n - BUFFERS + 1] if n >= BUFFERS else []
            self._add(Op(OpKind.LOAD_BLOCKS, layer, batch, slot), *free)
        if is_first:
            self._add(Op(OpKind.PROJECT, layer, batch, weight_slot), *weights)
        self._add(Op(OpKind.PLACE, layer, batch, slot), *([self._loads[n]] if shape.loads else []))
        if shape.rebuilds and self._layers[layer].rebuilds:
            self._add(Op(OpKind.REBUILD, layer, batch, slot))
        self._attends.append(self._add(Op(OpKind.ATTEND, layer, batch, slot)))
        if shape.stores:
            self._add(Op(OpKind.STORE, layer, batch), self._attends[-1])
        if is_last:
            finish = self._add(Op(OpKind.FINISH, layer, batch), *self._experts(layer, batch))
            if batch == len(self._batches) - 1:
                self._finishes.append(finish)

    def _experts(self, layer: int, batch: int) -> tuple[_Ref, ...]:
        """What completes the experts of a layer for the group that ends with `batch`; nothing where they are there."""
        place = self._layers[layer]
        if not (place.on_demand or place.has_coded_experts):
            return ()
        chosen = self._add(Op(OpKind.ROUTE, layer, batch))
        loaded = (self._add(Op(OpKind.LOAD_EXPERTS, layer, batch), chosen),) if place.on_demand else ()
        if not place.has_coded_experts:
            return loaded
        self._add(Op(OpKind.DECODE_EXPERTS, layer, batch), *loaded)
        return ()  # what follows on the same stream needs not wait for them again

    def _layer_weights(self, layer: int) -> tuple[_Ref, ...]:
        """What completes the weights of a layer; nothing where they lie on the device."""
        if not self._layers[layer].is_streamed:
            return ()
        number = len(self._weights)
        if number < len(self._carried.loaded):
            self._weights.append(_Ref(None, self._carried.loaded[number]))
        elif number < BUFFERS and not self._carried.loaded:  # the first of all: they wait for no blocks
            self._load_weights(layer, [])
        else:
            self._load_weights(layer, self._between(self._streamed[number - 1], layer))
        return (self._weights[-1],)

    def _load_weights(self, layer: int, anchors: list[tuple[float, _Ref]]) -> None:
        """A streamed layer's weights: behind each anchor's blocks, the part up to its share of them all.

        What is spread waits for no load, and no load for it: a layer has room for both.
        """
        number, place = len(self._weights), self._layers[layer]
        before, size = number - BUFFERS, place.bus_bytes
        free = (self._last_use(before),) if before >= 0 else ()
        slot, ref = self._slot(number), None
        if place.spread_bytes:
            after = free if self._finishes else ()  # where nothing computes a gather used it last, on the same stream
            ref = self._add(Op(OpKind.GATHER_SPREAD, layer, slot=slot), *after)
        ends = _cut(size, [share for share, _ in anchors] or [1.0])
        behind: list[tuple[_Ref, ...]] = [(blocks,) for _, blocks in anchors] or [()]
        for part, blocks in zip(pairwise((0, *ends)), behind, strict=True):
            if part[0] < part[1]:
                ref = self._add(Op(OpKind.LOAD_WEIGHTS, layer, slot=slot, part=part), *free, *blocks)
                free = ()  # the others follow the first on its stream
        assert ref is not None  # a streamed layer has bytes
        if size and place.is_gathered:
            ref = self._add(Op(OpKind.GATHER, layer, slot=slot), ref)
        self._weights.append(ref)

    def _last_use(self, number: int) -> _Ref:
        """What uses the buffer of the streamed layer of that number last."""
        return self._finishes[self._streamed[number]] if self._finishes else self._weights[number]

    def _between(self, first: int, end: int) -> list[tuple[float, _Ref]]:
        """Loads of blocks of the layers from `first` to before `end`, and which share of those is done with each."""
        begin, stop = first * len(self._batches), end * len(self._batches)
        return [((n - begin + 1) / (stop - begin), self._loads[n]) for n in range(begin, stop) if n in self._loads]


def _cut(size: int, shares: Sequence[float]) -> list[int]:
    """Where the parts end, by the shares that are due; all of it with the last one, and no part is small."""
    ends, sent = [], 0
    for share in (*shares[:-1], 1.0):
        due = math.ceil(size * share)
        if due > sent:
            sent = min(size, max(due, sent + MIN_PART_BYTES))
        ends.append(sent)
    return ends
