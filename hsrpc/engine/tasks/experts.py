"""Experts that come on demand: brings those that the router chose to slots on the device, by the step's list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.device.device import Device
from hsrpc.engine.weights import HostExperts
from hsrpc.plan.demand import Demand
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.schedule.expert_slots import ExpertLoad, ExpertSlots
from hsrpc.schedule.step import Ints, Runs


class ExpertCounts(NamedTuple):
    """Experts that steps needed, each layer and group counted."""

    hits: int = 0
    """Those in a slot."""
    loads: int = 0
    """Those that crossed the bus."""
    loaded_bytes: int = 0


class ExpertLoader:
    """Loads experts, one layer after the other.

    A layer's choice is known when all that was computed before it is done. So nothing reads any more what is then
    written over: slots of this layer, the area that all layers share, this layer's table, and the choice itself.
    """

    def __init__(
        self,
        layers: Sequence[HostExperts | None],
        demand: Demand,
        device: Device,
        tables: Sequence[str],
        *,
        max_tokens: int,
    ) -> None:
        """`tables`: names of the tables of addresses, in the order of an expert's tensors.

        `max_tokens`: for which experts are chosen at once.
        """
        self.counts = ExpertCounts()
        self._device = device
        self._demand = demand
        shape = (demand.num_rows, demand.expert_bytes)
        self._rows = device.empty(shape, torch.uint8, DeviceUse.EXPERTS)
        self._layers = [
            None if experts is None else _Layer(number, experts, demand, _Tables(device, experts, self._rows, tables))
            for number, experts in enumerate(layers)
        ]
        memory = device.small_pinned(max_tokens * demand.k * torch.int64.itemsize)
        self._choices = memory.view(torch.int64).view(max_tokens, demand.k)
        self._expected = self._choices[:0]

    def expect(self, num_tokens: int) -> torch.Tensor:
        """Where to send the next choice: int64 [num_tokens, k] on the host, which `load` reads."""
        self._expected = self._choices[:num_tokens]
        return self._expected

    def load(self, number: int) -> int:
        """Load a layer's chosen experts that are not in its slots, on the load stream; how many bytes these are.

        Blocks this thread until the choice is there: nothing else was launched on the compute stream behind it.
        """
        layer, device = self._layer(number), self._device
        chosen = device.arrived(self._expected, device.record(device.compute))
        needed = np.flatnonzero(np.bincount(chosen.numpy().reshape(-1))).tolist()
        loads = layer.slots.bring(needed)
        size, counts = len(loads) * self._demand.expert_bytes, self.counts
        hits = counts.hits + len(needed) - len(loads)
        self.counts = ExpertCounts(hits, counts.loads + len(loads), counts.loaded_bytes + size)
        if loads:
            with device.on(device.load):
                self._launch(layer, loads)
        return size

    def _launch(self, layer: _Layer, loads: Sequence[ExpertLoad]) -> None:
        """Copy experts to their places, and tell their addresses, on the current stream."""
        experts, rows = np.array([(expert, layer.row(place)) for expert, place in loads], dtype=np.int64).T
        self._device.copy_runs(self._rows, layer.experts.memory, Runs(experts, rows, np.ones_like(rows)))
        layer.tables.write(experts, rows)

    def with_experts(self, number: int, others: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A layer's other weights, with the tables of its experts, and the weights of those that were loaded last."""
        layer = self._layer(number)
        return _WithExperts({**others, **layer.tables.by_name}, partial(self._find, layer))

    def _find(self, layer: _Layer, name: str) -> torch.Tensor:
        expert, part = layer.experts.parts[name]
        return part.open(self._rows[layer.row(layer.slots.place(expert))], self._rows[0, :0])

    def _layer(self, number: int) -> _Layer:
        layer = self._layers[number]
        assert layer is not None  # only layers with experts are in the list
        return layer


class _WithExperts(dict[str, torch.Tensor]):
    """Weights by name; what is not among them is looked up where it lies now."""

    def __init__(self, weights: Mapping[str, torch.Tensor], find: Callable[[str], torch.Tensor]) -> None:
        super().__init__(weights)
        self._find = find

    def __missing__(self, name: str) -> torch.Tensor:
        return self._find(name)


class _Tables:
    """Addresses of a layer's experts on the device, in one table for each of their tensors."""

    def __init__(self, device: Device, experts: HostExperts, rows: torch.Tensor, names: Sequence[str]) -> None:
        """`names`: of the tables, in the order of an expert's tensors. At first all addresses are those of row 0."""
        self._rows = rows
        self._offsets = np.array([part.offset for part in experts.of_first], dtype=np.int64)[:, None]
        num_experts = len(experts.memory)
        memory = device.small_memory(len(self._offsets) * num_experts * torch.int64.itemsize)
        self._host, self._on_device = (part.view(torch.int64).view(-1, num_experts) for part in memory)
        self.by_name = dict(zip(names, self._on_device, strict=True))
        """int64 [E] each, on the device."""
        self.write(np.arange(num_experts), np.zeros(num_experts, dtype=np.int64))

    def write(self, experts: Ints, rows: Ints) -> None:
        """Let `experts` lie in these rows, on the current stream. The host's copy is free: see `ExpertLoader`."""
        self._host.numpy()[:, experts] = self._rows.data_ptr() + rows * self._rows.stride(0) + self._offsets
        self._on_device.copy_(self._host, non_blocking=True)


class _Layer:
    """One layer's experts: on the host, in slots, and the tables that say where."""

    def __init__(self, number: int, experts: HostExperts, demand: Demand, tables: _Tables) -> None:
        self.experts = experts
        self.tables = tables
        self.slots = ExpertSlots(demand.slots_of(number))
        self._first_row, self._first_shared = demand.first_rows[number], demand.first_rows[-1]

    def row(self, place: int) -> int:
        """The row on the device of one of the layer's places."""
        beyond = place - self.slots.num_slots
        return self._first_row + place if beyond < 0 else self._first_shared + beyond
