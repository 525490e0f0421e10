"""Experts that come on demand: brings those that the router chose to slots on the device, by the step's list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.device.device import Device
from hsrpc.engine.chosen_experts import ChosenExperts, ExpertDecoding
from hsrpc.engine.weights import HostExperts, OpenedLayer, decodings
from hsrpc.model.formats.format import Encoded
from hsrpc.plan.demand import Demand
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.sizes import align
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
            None if experts is None else _Layer(number, experts, demand, self._tables(experts))
            for number, experts in enumerate(layers)
        ]
        self._names = tables
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
        """Copy experts to their places, and tell where they are, on the current stream."""
        experts, rows = np.array([(expert, layer.row(place)) for expert, place in loads], dtype=np.int64).T
        self._device.copy_runs(self._rows, layer.experts.memory, Runs(experts, rows, np.ones_like(rows)))
        layer.tables.write(experts, rows)

    def open(
        self, number: int, others: OpenedLayer, decoded: torch.Tensor, chosen: ChosenExperts | None
    ) -> OpenedLayer:
        """A layer's weights with its experts: where they were loaded to last, or where they are decoded to.

        `decoded` (uint8): the buffer for all experts of a layer, to which `chosen` says which are decoded; None: they
        lie ready.
        """
        layer = self._layer(number)
        if chosen is not None:
            return self._open_coded(layer, others, decoded, chosen)
        tables = dict(zip(self._names, layer.tables.on_device, strict=True))
        return others._replace(tensors=_WithExperts({**others.tensors, **tables}, partial(self._find, layer)))

    def _open_coded(
        self, layer: _Layer, others: OpenedLayer, decoded: torch.Tensor, chosen: ChosenExperts
    ) -> OpenedLayer:
        """Each expert as if it lay in the first row: by then it is moved to its own."""
        tensors, encoded = dict(others.tensors), []
        for name, (expert, part) in layer.experts.parts.items():
            tensors[name] = operand = part.open(self._rows[0], decoded)
            encoded.append(Encoded(part.packing, part.data(self._rows[0]), operand, expert))
            decoded = decoded[align(part.packing.decoded_bytes) :]
        [places] = layer.tables.on_device
        decoding = ExpertDecoding(chosen, places, decodings(encoded, chosen.moves))
        return others._replace(tensors=tensors, experts=decoding)

    def _tables(self, experts: HostExperts) -> _Tables:
        """For each tensor of an expert its address; of coded ones, one table: bytes from the first row to its own."""
        first = self._rows.data_ptr()
        bases = [0] if experts.is_coded else [first + part.offset for part in experts.of_first]
        return _Tables(self._device, bases, self._rows.stride(0), len(experts.memory))

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
    """Where a layer's experts lie on the device: tables of a number for each expert."""

    def __init__(self, device: Device, bases: Sequence[int], stride: int, num_experts: int) -> None:
        """`bases`: of each table the number of what lies in row 0; `stride`: by how much those of rows differ.

        At first all experts lie in row 0.
        """
        self._bases = np.array(bases, dtype=np.int64)[:, None]
        self._stride = stride
        memory = device.small_memory(len(bases) * num_experts * torch.int64.itemsize)
        self._host, self.on_device = (part.view(torch.int64).view(-1, num_experts) for part in memory)
        self.write(np.arange(num_experts), np.zeros(num_experts, dtype=np.int64))

    def write(self, experts: Ints, rows: Ints) -> None:
        """Let `experts` lie in these rows, on the current stream. The host's copy is free: see `ExpertLoader`."""
        self._host.numpy()[:, experts] = self._bases + rows * self._stride
        self.on_device.copy_(self._host, non_blocking=True)


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
