"""Whole decode steps of a model that lies on the device with all its cache, launched as a few graphs, or as one.

A step of a small resident model takes a few milliseconds, and launching its kernels one by one would take longer. So
it is captured for each of a few numbers of rows; steps of fewer are padded with rows that read nothing. A drafted token
is a row as the newest one is. Where experts come on demand, the host has to know in each layer which of them the router
has chosen: there the step's list is cut, and each segment is a graph. Otherwise there is one segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from hsrpc.device.device import Device
from hsrpc.engine.forward import DeviceBatch, DeviceLayout, Forward, Group, Pass
from hsrpc.engine.tasks.cache import CacheManager, DeviceRows, Gathers, LayerKind, Stores
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.model.attention import InPlaceRows
from hsrpc.plan.graph_sizes import graph_sizes
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.schedule.blocks import BlockKind, PoolId
from hsrpc.schedule.step import NO_RUNS, MiniBatch, StopFlag
from hsrpc.schedule.sweep import BatchShape, Op, OpKind, Places, sweep

_TOKEN, _POSITION, _COUNT, _SLOT, _TABLE = range(5)
"""Columns of a step's input; the block table takes the rest."""


class DecodeGraphs:
    """Runs mini-batches that are in place."""

    def __init__(
        self,
        forward: Forward,
        cache: CacheManager,
        prefetcher: WeightPrefetcher,
        device: Device,
        *,
        layers: Places,
        plan: Plan,
    ) -> None:
        self._launches = forward
        self._cache = cache
        self._prefetcher = prefetcher
        self._device = device
        ops = sweep(layers, (BatchShape(),)).ops
        self._choosing = [op.layer for op in ops if op.kind is OpKind.LOAD_EXPERTS]
        """Layers whose experts come on demand: their choices are between the segments."""
        self._routes = any(op.kind is OpKind.ROUTE for op in ops)
        """Whether experts are made ready that are chosen."""
        self._max_model_len = plan.max_model_len
        self._windows = forward.sizes.windows.distinct
        self._pool, self._absorbs = plan.in_place, plan.absorbs
        segments = _segments(ops)
        self._sizes = graph_sizes(plan.max_batch, len(segments), plan.max_draft_tokens)
        self._pass = Pass([])
        """The step under way: what a segment leaves to the next one."""
        max_size = self._sizes[-1]
        columns = _TABLE + -(-plan.max_model_len // plan.block_size)
        with device.on(device.compute):  # which reads them at once
            self._input = device.empty((max_size, columns), torch.int32, DeviceUse.GRAPH_BUFFERS)
            self._input.copy_(torch.from_numpy(self._padding(max_size)))
            self._rows = torch.arange(max_size, device=device.torch_device)
            self._nothing = torch.zeros(max_size + 1, dtype=torch.int32, device=device.torch_device)
            logits = min(forward.sample_rows, max_size), forward.sizes.vocab_size
            others = max_size - logits[0], forward.sizes.hidden_size
            self._logits = device.empty(logits, torch.float32, DeviceUse.GRAPH_BUFFERS)
            self._others = device.empty(others, forward.dtype, DeviceUse.GRAPH_BUFFERS)
        # The largest first, so that the others fit into its memory.
        self._graphs = {
            size: device.capture(*(partial(self._compute, size, segment) for segment in segments))
            for size in reversed(self._sizes)
        }

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device within a step: for choices of experts."""
        return bool(self._choosing)

    def run(self, batch: MiniBatch, sampled: torch.Tensor | None, stop: StopFlag) -> Pass | None:
        """A mini-batch in place up to its first logits, launched on the compute stream; good until the next run.

        `sampled`: token ids of the step before on the device, with which chunks that have a `previous_row` continue.
        None where the step was stopped.
        """
        count, in_place = batch.num_queries, batch.widest.in_place
        size = self._sizes[bisect_left(self._sizes, count)]
        array = self._padding(size)
        array[:count, _TOKEN] = batch.token_ids
        array[:count, _POSITION] = batch.positions
        array[:count, _COUNT] = in_place.counts
        array[:count, _SLOT] = batch.stores[self._pool].target
        array[:count, _TABLE : _TABLE + in_place.tables.shape[1]] = in_place.tables
        with self._device.on(self._device.compute):
            self._input[:size].copy_(self._device.upload(array))
            if sampled is not None:
                tokens = self._input[:count, _TOKEN]
                # A failed row has no token; it is computed in vain, with some token.
                tokens.copy_(sampled.index_select(0, tokens.long()).clamp_(min=0))
            if not self._launch(size, stop):
                return None
        return Pass([], logits=self._logits[:count], others=self._others[: max(0, count - len(self._logits))])

    def _launch(self, size: int, stop: StopFlag) -> bool:
        """Launch the segments of a step, each once its experts are under way; whether all were."""
        first, *others = self._graphs[size]
        first()
        for layer, graph in zip(self._choosing, others, strict=True):
            self._prefetcher.expect(layer, size)
            if self._prefetcher.load_experts(layer):
                self._device.wait(self._device.compute, self._device.record(self._device.load))
            if stop.is_set:
                return False
            graph()
        return True

    def _padding(self, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """Rows that read no key and write behind the pool's last block."""
        array = np.zeros((size, self._input.shape[1]), dtype=np.int32)
        array[:, _SLOT] = self._cache.spare_slot
        return array

    def _compute(self, size: int, ops: Sequence[Op]) -> None:
        for op in ops:
            if op.kind is OpKind.EMBED:
                self._pass = Pass([self._batch(size)])
            self._launches.launch(op, self._pass)
            if op.kind is OpKind.HEAD:
                self._keep(self._pass)
                self._pass = Pass([])

    def _keep(self, done: Pass) -> None:
        """Copy what HEAD made to where it stays while the next graph runs."""
        assert done.logits is not None
        assert done.others is not None
        self._logits[: len(done.logits)].copy_(done.logits)
        self._others[: len(done.others)].copy_(done.others)

    def _batch(self, size: int) -> DeviceBatch:
        """The mini-batch that is in the input."""
        given = self._input[:size]
        positions, slots = given[:, _POSITION].long(), given[:, _SLOT].long()
        rows = self._rows[:size]
        layouts = [self._layout(given, window) for window in self._windows]
        stores: Mapping[PoolId, Stores] = {self._pool: Stores(DeviceRows(rows, slots), NO_RUNS)}
        # Padding takes the experts of the first row, so that no others are loaded, decoded or read for it.
        choosing = rows * (given[:, _COUNT] > 0) if self._routes and size > 1 else None
        return DeviceBatch(
            group=Group(given[:, _TOKEN].long(), positions, self._absorbs, choosing),
            rows=slice(0, size),
            is_first=True,
            is_last=True,
            num_in_place=size,
            layouts=layouts,
            gathers={LayerKind(number, held): Gathers({}, {}) for number in range(len(layouts)) for held in BlockKind},
            stores=dict.fromkeys(BlockKind, stores),
            sample_rows=rows,
        )

    def _layout(self, given: torch.Tensor, window: int | None) -> DeviceLayout:
        """All tokens are in the tables, which begin no later than what the widest window shows."""
        counts, nothing = given[:, _COUNT].contiguous(), self._rows[:0]
        return DeviceLayout(
            in_place=InPlaceRows(
                tables=given[:, _TABLE:],
                counts=counts,
                skips=None if window is None else (counts - window).clamp_(min=0),
                rebuilt_starts=self._nothing,
                key_starts=self._nothing,
                max_keys=min(self._max_model_len, window or self._max_model_len),
            ),
            packed=None,
            num_rebuilt=0,
            num_absorbed=0,
            absorbed=DeviceRows(nothing, nothing),
            new_rows=DeviceRows(nothing, nothing),
            activation_rows=nothing,
            activation_positions=nothing,
            copies=DeviceRows(nothing, nothing),
        )


def can_capture(plan: Plan) -> bool:
    """Whether graphs can run steps: no weights stream, and blocks read in place lie on the device."""
    return not any(plan.streamed_bytes) and plan.num_blocks[plan.in_place] > 0


def _segments(ops: Sequence[Op]) -> list[list[Op]]:
    """What is computed between the choices of experts, up to the logits."""
    segments: list[list[Op]] = [[]]
    for op in ops:
        if op.kind is OpKind.LOAD_EXPERTS:
            segments.append([])
        elif op.kind is not OpKind.SAMPLE:
            segments[-1].append(op)
    return segments
