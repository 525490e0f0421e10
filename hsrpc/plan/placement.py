"""Choices of the weights that stay on the device, and the bytes that follow from each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hsrpc.config import ResidentWeights
from hsrpc.plan.demand import Demand, demand_of
from hsrpc.plan.sizes import Floats, ModelSizes, PlacedSizes, Stays, TensorSizes, WeightBuffers
from hsrpc.schedule.sweep import BUFFERS

_PACKED_WORTH = 0.98
"""What stays is decoded in every step only where that gains more than 2 %: a smaller gain is within what predictions do
not tell apart."""
_OPENED_STEP = 4
"""Of the shares that are tried, every so many are for weights that are ready while all others stay packed."""
Resident = tuple[Stays, ...]
"""The weight tensors that stay on the device, for each layer."""


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """What stays of the layers' weights, and how the others come."""

    resident: Resident
    demand: Demand | None = None
    """Experts come on demand, and are not among the resident weights; None: all that does not stay streams."""

    @property
    def keeps_packed(self) -> bool:
        """Whether some weights that stay are decoded in every step."""
        return any(stays.packed for stays in self.resident)

    def in_sizes(self, sizes: ModelSizes) -> ModelSizes:
        """The model with the weights that stay or stream."""
        return sizes if self.demand is None else sizes.without_experts


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    choices: tuple[WeightChoice, ...]
    resident: Floats
    """Bytes that stay, all layers, at most: a tensor that is ready is allocated by itself, without padding."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    on_bus_at_most: Floats
    """Bytes that cross it in a step that needs every expert."""
    decode_traffic: Floats
    """Bytes of device memory that decoding reads and writes in every step, but for experts."""
    expert_traffic: Floats
    """The same for all experts; a step decodes those that its tokens take."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them, and for what is decoded."""
    experts: Floats
    """Bytes on the device for experts that come on demand."""
    on_demand: Floats
    """1: experts come on demand; 0: they stay or stream."""
    missed: Floats
    """Part of the experts that have no slot, where they come on demand; else 0."""
    worth: Floats
    """Factor on the speed that is predicted, where choices are compared."""
    num_segments: Floats
    """Graphs of a decode step, where no weights stream."""

    @classmethod
    def of(cls, sizes: ModelSizes, choices: Sequence[WeightChoice]) -> ResidentChoices:
        """What follows from each of the choices."""
        placed = [count_placed(choice.in_sizes(sizes), choice.resident) for choice in choices]
        demands = [choice.demand for choice in choices]
        bus = floats(sum(n * each.bus_bytes for each, n in found.items()) for found in placed)
        missed = floats(0 if demand is None else demand.missed for demand in demands)
        experts = floats(0 if demand is None else demand.host_bytes for demand in demands)
        return cls(
            choices=tuple(choices),
            resident=floats(_at_most(found, lambda each: each.resident_bytes) for found in placed),
            on_bus=bus,
            on_bus_at_most=bus + missed * experts,
            decode_traffic=floats(sum(n * each.decode_traffic for each, n in found.items()) for found in placed),
            expert_traffic=floats(sum(n * each.expert_traffic for each, n in found.items()) for found in placed),
            on_host=experts + floats(_at_most(found, lambda each: each.host_bytes) for found in placed),
            buffers=floats(BUFFERS * each.packed + each.decoded for each in map(WeightBuffers.of, placed)),
            experts=floats(0 if demand is None else demand.device_bytes + demand.table_bytes for demand in demands),
            on_demand=floats(demand is not None for demand in demands),
            missed=missed,
            worth=floats(_PACKED_WORTH if choice.keeps_packed else 1.0 for choice in choices),
            num_segments=floats(1 if demand is None else demand.num_segments for demand in demands),
        )


def floats(values: Iterable[float]) -> Floats:
    """One number for each choice."""
    return np.array(list(values), dtype=np.float64)


def streaming_choices(
    sizes: ModelSizes, shares: Sequence[float], residence: ResidentWeights = ResidentWeights.AUTO
) -> list[WeightChoice]:
    """The weights that stay for each of the given shares of all layers' bytes, at most; all others stream.

    Those stay packed, or ready. Where all may stay, there is between both: some are ready, and the others packed.
    """
    found: list[Resident] = []
    if residence is not ResidentWeights.DECODED and any(layer.coded for layer, _ in sizes.distinct):
        found += (_stay_packed(sizes, share) for share in sorted(shares))
        if residence is ResidentWeights.AUTO and 1.0 in shares:
            found += (all_stay(sizes, share) for share in sorted(shares)[::_OPENED_STEP])
    if residence is not ResidentWeights.PACKED or not found:
        found += (spread_resident(sizes, int(share * sizes.layers_bytes)) for share in sorted(shares))
    last = dict.fromkeys(reversed(found))  # of equal ones
    return [WeightChoice(resident) for resident in reversed(last)]


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


def count_placed(sizes: ModelSizes, resident: Resident) -> Counter[PlacedSizes]:
    """What the tensors of each layer take, and in how many layers they take the same."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    found: Counter[PlacedSizes] = Counter()
    for (kind, stays), count in alike.items():
        found[sizes.distinct[kind][0].placed(stays)] += count
    return found


def _at_most(placed: Counter[PlacedSizes], size: Callable[[PlacedSizes], float]) -> int:
    """Bytes of all layers, at most."""
    exact = sum(count * size(each) for each, count in placed.items())
    return math.ceil(round(exact, 3))  # what is rounded in the last place adds no byte


def spread_resident(sizes: ModelSizes, budget: int) -> Resident:
    """Tensors that stay ready in each layer: at most `budget` bytes in all, the same part of each layer."""
    return tuple(map(Stays, _spread(sizes, budget, lambda tensor: tensor.device_bytes)))


def _stay_packed(sizes: ModelSizes, share: float) -> Resident:
    """Tensors that stay, those packed that are coded: at most that share of what all take so."""
    names = _spread(sizes, int(share * _total(sizes, _packed_bytes)), _packed_bytes)
    both = zip(names, sizes.layers, strict=True)
    return tuple(Stays(ready=each - layer.coded, packed=each & layer.coded) for each, layer in both)


def all_stay(sizes: ModelSizes, share: float) -> Resident:
    """All tensors; ready are those that are not coded, and of the others at most that share of the room it takes."""

    def room(tensor: TensorSizes) -> int:
        return max(0, tensor.device_bytes - _packed_bytes(tensor))

    opened = _spread(sizes, int(share * _total(sizes, room)), room)
    both = zip(opened, sizes.layers, strict=True)
    return tuple(Stays(ready=layer.names - (layer.coded - each), packed=layer.coded - each) for each, layer in both)


def _packed_bytes(tensor: TensorSizes) -> int:
    return math.ceil(tensor.host_bytes)


def _total(sizes: ModelSizes, cost: Callable[[TensorSizes], int]) -> int:
    return sum(count * sum(map(cost, layer.tensors)) for layer, count in sizes.distinct)


def _spread(sizes: ModelSizes, budget: int, cost: Callable[[TensorSizes], int]) -> list[frozenset[str]]:
    """Tensors of each layer that cost at most `budget` in all, the same part in each layer.

    Layer by layer, largest first, the tensors are taken that keep the running total within the budget's part so far.
    """
    costs = [[(tensor.name, cost(tensor)) for tensor in layer.largest_first] for layer, _ in sizes.distinct]
    wholes = [sum(each for _, each in layer) for layer in costs]
    total = sum(wholes[kind] for kind in sizes.kinds)
    chosen: list[frozenset[str]] = []
    spent = passed = 0
    for kind in sizes.kinds:
        names = []
        passed += wholes[kind]
        limit = budget * passed // total
        for name, each in costs[kind]:
            if spent + each <= limit:
                names.append(name)
                spent += each
        chosen.append(frozenset(names))
    return chosen
