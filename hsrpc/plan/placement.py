"""Choices of the weights that stay on the device, and the bytes that follow from each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hsrpc.plan.demand import Demand, demand_of
from hsrpc.plan.sizes import Floats, ModelSizes, StreamedSizes, WeightBuffers
from hsrpc.schedule.sweep import BUFFERS

Resident = tuple[frozenset[str], ...]
"""Names of the packed tensors that stay on the device, for each layer."""


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """What stays of the layers' weights, and how the others come."""

    resident: Resident
    demand: Demand | None = None
    """Experts come on demand, and are not among the resident weights; None: all that does not stay streams."""

    def in_sizes(self, sizes: ModelSizes) -> ModelSizes:
        """The model with the weights that stay or stream."""
        return sizes if self.demand is None else sizes.without_experts


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    choices: tuple[WeightChoice, ...]
    resident: Floats
    """Bytes that stay, all layers: each tensor is allocated by itself, without padding."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    on_bus_at_most: Floats
    """Bytes that cross it in a step that needs every expert."""
    decode_traffic: Floats
    """Bytes of device memory that decoding these reads and writes in every step."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them."""
    experts: Floats
    """Bytes on the device for experts that come on demand."""
    on_demand: Floats
    """1: experts come on demand; 0: they stay or stream."""
    missed: Floats
    """Part of the experts that have no slot, where they come on demand; else 0."""
    num_segments: Floats
    """Graphs of a decode step, where no weights stream."""

    @classmethod
    def of(cls, sizes: ModelSizes, choices: Sequence[WeightChoice]) -> ResidentChoices:
        """What follows from each of the choices."""
        placed = [count_streamed(choice.in_sizes(sizes), choice.resident) for choice in choices]
        demands = [choice.demand for choice in choices]
        bus = floats(sum(n * each.bus_bytes for each, n in found.items()) for found in placed)
        missed = floats(0 if demand is None else demand.missed for demand in demands)
        experts = floats(0 if demand is None else demand.host_bytes for demand in demands)
        return cls(
            choices=tuple(choices),
            resident=floats(resident_bytes(each.in_sizes(sizes), each.resident) for each in choices),
            on_bus=bus,
            on_bus_at_most=bus + missed * experts,
            decode_traffic=floats(sum(n * each.decode_traffic for each, n in found.items()) for found in placed),
            on_host=experts + floats(host_bytes(found) for found in placed),
            buffers=floats(BUFFERS * each.packed + each.decoded for each in map(WeightBuffers.of, placed)),
            experts=floats(0 if demand is None else demand.device_bytes + demand.table_bytes for demand in demands),
            on_demand=floats(demand is not None for demand in demands),
            missed=missed,
            num_segments=floats(1 if demand is None else demand.num_segments for demand in demands),
        )


def floats(values: Iterable[float]) -> Floats:
    """One number for each choice."""
    return np.array(list(values), dtype=np.float64)


def streaming_choices(sizes: ModelSizes, shares: Sequence[float]) -> list[WeightChoice]:
    """The weights that stay for each of the given shares of all layers' bytes, at most; all others stream."""
    found = {spread_resident(sizes, int(share * sizes.layers_bytes)): None for share in sorted(shares)}
    return [WeightChoice(resident) for resident in found]


def demand_choices(sizes: ModelSizes, shares: Sequence[float]) -> list[WeightChoice]:
    """The same where experts come on demand; empty where they cannot.

    The other weights stay first, since every step needs them; then experts have slots.
    """
    others = sizes.without_experts
    found: dict[WeightChoice, None] = {}
    for share in sorted(shares):
        budget = int(share * sizes.layers_bytes)
        if (demand := demand_of(sizes, budget - others.layers_bytes)) is not None:
            resident = spread_resident(others, min(budget, others.layers_bytes))
            found[WeightChoice(resident, demand)] = None
    return list(found)


def resident_bytes(sizes: ModelSizes, resident: Resident) -> int:
    """Bytes of the weights that stay: each tensor is allocated by itself, without padding."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    return sum(count * sizes.distinct[kind][0].resident_bytes(names) for (kind, names), count in alike.items())


def count_streamed(sizes: ModelSizes, resident: Resident) -> Counter[StreamedSizes]:
    """What streams of each layer, and in how many layers the same does."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    found: Counter[StreamedSizes] = Counter()
    for (kind, names), count in alike.items():
        found[sizes.distinct[kind][0].streamed(names)] += count
    return found


def host_bytes(streamed: Counter[StreamedSizes]) -> int:
    """Bytes of all layers' streamed weights in host memory, at most."""
    exact = sum(count * each.host_bytes for each, count in streamed.items())
    return math.ceil(round(exact, 3))  # what is rounded in the last place adds no byte


def spread_resident(sizes: ModelSizes, budget: int) -> Resident:
    """Tensors that stay on the device in each layer: at most `budget` bytes in all, the same part of each layer.

    Layer by layer, largest first, the tensors stay that keep the running total within the budget's part so far.
    """
    chosen: list[frozenset[str]] = []
    spent = passed = 0
    for layer in sizes.layers:
        names = []
        passed += layer.weight_bytes
        limit = budget * passed // sizes.layers_bytes
        for tensor in layer.largest_first:
            if spent + tensor.device_bytes <= limit:
                names.append(tensor.name)
                spent += tensor.device_bytes
        chosen.append(frozenset(names))
    return tuple(chosen)
