"""Prefetches layer weights from pinned memory, in the parts that the step's list has of them."""

from __future__ import annotations

import asyncio

import torch

from hsrpc.device.device import Device
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.engine.chosen_experts import ChosenExperts
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.tasks.experts import ExpertCounts, ExpertLoader
from hsrpc.engine.weights import ModelWeights, OpenedLayer
from hsrpc.engine.worker import Worker
from hsrpc.model.family import Family
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.schedule.sweep import BUFFERS, Lane, LayerPlacement, Op, OpKind, Places


class WeightPrefetcher:
    """Task that runs the weights' lane of each step: it sweeps over the streamed layers, ahead of the executor."""

    def __init__(
        self, weights: ModelWeights, plan: Plan, device: Device, family: Family, group: DeviceGroup = ALONE
    ) -> None:
        """`group`: the GPUs that load what streams for each other."""
        self.streamed_bytes = 0
        """Copied to the device since the start, experts on demand among them."""
        self.steps: asyncio.Queue[StepRun] = asyncio.Queue(1)
        self._layers = weights.layers
        self._device = device
        self._family = family
        self._group = group
        streams = any(layer.parts for layer in weights.layers)
        self._buffers = [self._buffer(plan.weight_buffer_bytes) for _ in range(BUFFERS * streams)]
        self._decoded = self._buffer(plan.decode_buffer_bytes)
        self._of_experts = self._decoded[:0]
        """The end of that, for experts on demand."""
        self._coded = self._buffer(family.activations.coded_weight_bytes)
        self._chosen: ChosenExperts | None = None
        if any(layer.has_coded_experts for layer in weights.layers):
            self._chosen = ChosenExperts(device, max(len(family.expert_names(i)) for i in range(family.num_layers)))
        few_rows = (rows for layer in weights.layers for rows in layer.few_rows(family.multiplied))
        self._few_rows = min(few_rows, default=0)
        """Most rows that are multiplied by weights as they lie."""
        self._open: dict[tuple[int, int, bool], OpenedLayer] = {}
        """Opened layers by layer and buffer, and whether they are for few rows."""
        self._experts: ExpertLoader | None = None
        if plan.demand is not None:
            self._of_experts = self._decoded[len(self._decoded) - plan.demand.decoded_bytes :]
            experts = [layer.experts for layer in weights.layers]
            tables, max_tokens = family.expert_tables, plan.buffers.queries
            self._experts = ExpertLoader(experts, plan.demand, device, tables, max_tokens=max_tokens)

    @property
    def places(self) -> Places:
        """Placement of each layer's weights."""
        codes = self._family.activations.coded_weight_bytes > 0
        return tuple(
            LayerPlacement(
                each.bus_bytes,
                each.is_decoded or codes,
                has_coded_experts=each.has_coded_experts,
                on_demand=each.experts is not None,
                is_gathered=bool(each.parts) and not self._group.is_alone,
                spread_bytes=each.spread_bytes,
            )
            for each in self._layers
        )

    @property
    def expert_counts(self) -> ExpertCounts:
        """Experts that came on demand since the start."""
        return ExpertCounts() if self._experts is None else self._experts.counts

    def reset_counts(self) -> None:
        """Count from 0 again."""
        self.streamed_bytes = 0
        if self._experts is not None:
            self._experts.counts = ExpertCounts()

    def _buffer(self, size: int) -> torch.Tensor:
        return self._device.empty((size,), torch.uint8, DeviceUse.WEIGHT_BUFFERS)

    async def run(self) -> None:
        """Run step after step; ends by cancellation."""
        async with Worker("weights") as worker:
            while True:
                await (await self.steps.get()).run(Lane.WEIGHTS, worker, self.launch)

    def launch(self, op: Op) -> None:
        """Load a part of a layer's weights to a buffer, on the current stream, or the experts that were chosen.

        Or get what the other GPUs have loaded of the layer, or what all hold of it.
        """
        if op.kind is OpKind.LOAD_EXPERTS:
            self.load_experts(op.layer)
            return
        layer, group = self._layers[op.layer], self._group
        spread, loaded = self._buffers[op.slot].tensor_split([group.size * layer.spread_bytes])
        if op.kind is OpKind.GATHER_SPREAD:
            assert layer.spread is not None  # else the list does not ask for it
            group.gather(spread, layer.spread)
            return
        assert layer.packed is not None  # only layers that this GPU loads some of are in the list
        size, (start, end) = len(layer.packed), op.part
        own = loaded[group.rank * size :][:size]
        if op.kind is OpKind.GATHER:
            group.gather(loaded[: group.size * size], own)
            return
        self._device.load_bytes(own[start:end], layer.packed[start:end])
        self.streamed_bytes += end - start

    def load_experts(self, layer: int) -> int:
        """Load what a layer's router has chosen and is not there, on the load stream, once it is known; the bytes."""
        size = self._on_demand.load(layer)
        self.streamed_bytes += size
        return size

    def expect(self, layer: int, num_tokens: int) -> torch.Tensor | None:
        """Where on the host a layer's choice of experts is to go: int64 [num_tokens, k]; None: none come on demand."""
        return None if self._layers[layer].experts is None else self._on_demand.expect(num_tokens)

    @property
    def _on_demand(self) -> ExpertLoader:
        assert self._experts is not None  # else the list does not ask for it
        return self._experts

    def open(self, layer: int, slot: int, num_rows: int | None = None) -> OpenedLayer:
        """A layer's weights, in that buffer where they are streamed: made once, for it takes long.

        `num_rows`: at most so many go through its products at once, and no K and V are rebuilt; None: any number, and
        they may be.
        """
        key = layer, slot, num_rows is not None and num_rows <= self._few_rows
        if key not in self._open:
            self._open[key] = self._make(*key)
        return self._open[key]

    def _make(self, layer: int, slot: int, is_few: bool) -> OpenedLayer:
        weights = self._layers[layer]
        buffer = self._buffers[slot] if weights.parts else self._decoded[:0]
        multiplied = self._family.multiplied if is_few else frozenset[str]()
        opened = weights.open(buffer, self._decoded, self._chosen, multiplied)
        if weights.experts is not None:
            opened = self._on_demand.open(layer, opened, self._of_experts, self._chosen)
        ready, more = self._family.activations.prepared(self._family.opened(layer, opened.tensors), self._coded)
        return opened._replace(tensors=ready, decodings=(*opened.decodings, *more))
